"""The demo page, in Gradio: choose or become a user, see what is recommended, and ask why."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from html import escape
from typing import Any

# Read when Gradio is imported: no reports home
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .render import STYLE, answer_view, name_of, notice, options_view, person_view, spoken
from .service import MAX_FEATURES_LENGTH, MAX_ID_LENGTH, DemoError, DemoService

logger = logging.getLogger(__name__)

# Visitors whose ratings are kept, and requests that wait or are worked on at once
_MAX_SESSIONS, _MAX_WAITING, _MAX_AT_ONCE = 1000, 32, 2
_PREDICTED = "as predicted"
_FAILED = "Something went wrong on the server. Please try again; whoever runs it finds the reason in its log."

# What Gradio has no options for: suggestions in boxes for ids; choices that are one stop of the Tab key, in a named
# group; and sentences that are read out. Again after each change, since Gradio makes parts of the page anew.
_ON_LOAD = """() => {
  const complete = () => {
    for (const kind of ["user", "item"]) {
      document.querySelectorAll(`.${kind}-box input`).forEach((box) => box.setAttribute("list", `${kind}-options`));
    }
    document.querySelectorAll("fieldset").forEach((group) => {
      group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]").textContent);
      group.querySelectorAll("[type=radio]").forEach((choice) => {
        if (choice.name !== group.id) choice.name = group.id;
      });
    });
    document.querySelectorAll(".gavamoe-notice").forEach((part) => part.setAttribute("aria-live", "polite"));
  };
  complete();
  new MutationObserver(complete).observe(document.body, { childList: true, subtree: true, attributeFilter: ["name"] });
}"""

# Gradio's own greys and blues are too pale to be read by everyone (WCAG 2.1 asks for a contrast of 4.5)
_CONTRAST = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
}


def build_page(service: DemoService, title: str = "Explained recommendations") -> gr.Blocks:
    """
    The page; `launch_page` serves it.

    Args:
        service ([`DemoService`]): What answers.
        title (`str`, *optional*): Its heading.
    """
    return _Page(service, title).blocks


def launch_page(blocks: gr.Blocks, **kwargs: Any) -> Any:
    """
    Serves a page with the bounds, the look and the privacy that it is made for: nothing is loaded from elsewhere.

    Args:
        blocks (`gr.Blocks`): From [`build_page`].
        kwargs: passed to `gr.Blocks.launch` (`server_name`, `server_port`, `share`, `prevent_thread_lock`, ...).
    """
    # Fonts of the system's own: others would come from elsewhere
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(**_CONTRAST)
    blocks.queue(max_size=_MAX_WAITING, api_open=False)
    options = {
        "theme": theme,
        "css": STYLE,
        "js": _ON_LOAD,
        "footer_links": [],
        "state_session_capacity": _MAX_SESSIONS,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "enable_monitoring": False,
        "run_history": False,
        # Nobody has a file to give: without a bound, the route that takes uploads keeps whatever anybody sends
        "max_file_size": 1,
    }
    return blocks.launch(**{**options, **kwargs})


# What is answered at once, without a place in the queue
_QUIET = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}


class _Page:
    """The components, and what happens between them. What a visitor did is in `gr.State`, not here."""

    def __init__(self, service: DemoService, title: str):
        self.service = service
        self.examples = {kind: service.examples(kind) for kind in ("user", "item")}
        with gr.Blocks(title=title, analytics_enabled=False) as self.blocks:
            self.person, self.ratings = gr.State(), gr.State({})
            self.options = {kind: _html(self._search(kind), classes="gavamoe-options") for kind in ("user", "item")}
            _html(
                f"<h1>{escape(title)}</h1><p>Choose a user, or rate a few items as a new one. The model predicts what "
                "they would like, and says why.</p>"
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    self._person_part()
                with gr.Column(min_width=300, visible=False) as self.item_part:
                    self._item_part()
            self._connect()

    def _person_part(self) -> None:
        _html("<h2>1. For whom?</h2>")
        with gr.Tabs():
            with gr.Tab("Known user"):
                self.some_users = self._examples("user", "Some users")
                self.user = self._search_box("user", "User", "user")
                self.show = gr.Button("Show this user", variant="primary")
                self.anyone = gr.Button("Show someone unknown instead")
            with gr.Tab("New user"):
                self.some_items = self._examples("item", "Some items")
                self.rated_item = self._search_box("item", "Item to rate", "rated-item")
                levels = [(f"{level:g}", level) for level in self.service.rating_levels]
                self.stars = gr.Radio(levels, label="Your rating", elem_id="stars")
                self.rate = gr.Button("Add rating", variant="primary")
                self.restart = gr.Button("Start again")
        self.person_notice = _html("", "person-notice", "gavamoe gavamoe-notice")
        self.person_view = _html("", "person-view")

    def _item_part(self) -> None:
        _html("<h2>2. Which item?</h2>")
        self.best = gr.Radio([], label="Recommended, with predicted ratings", elem_id="best")
        self.item = self._search_box("item", "Item to explain", "item")
        with gr.Accordion("Options", open=False):
            levels = [_PREDICTED, *(f"{level:g}" for level in self.service.rating_levels)]
            self.rating = gr.Radio(
                levels,
                value=_PREDICTED,
                label="Rating to explain",
                info="A low one is criticism, a high one praise.",
                elem_id="rating",
            )
            self.features = gr.Textbox(
                label="Features",
                info="What to talk about, with commas between. If empty, what the item is known for.",
                max_lines=1,
                max_length=MAX_FEATURES_LENGTH,
            )
        self.explain = gr.Button("Explain", variant="primary")
        self.unknown_item = gr.Button("Explain an unknown item instead")
        self.answer_notice = _html("", "answer-notice", "gavamoe gavamoe-notice")
        self.answer_view = _html("", "answer-view")

    def _search_box(self, kind: str, label: str, elem_id: str) -> gr.Textbox:
        """
        A box for ids, with those that match what is typed so far as the browser's own suggestions. They are searched
        on the server: of many thousands of ids, the browser gets a few.
        """
        box = gr.Textbox(
            label=label,
            info=f"Type the id of a known {kind}, or a part of it to find some.",
            max_lines=1,
            max_length=MAX_ID_LENGTH,
            elem_id=elem_id,
            elem_classes=f"{kind}-box",
        )
        box.input(functools.partial(self._search, kind), box, self.options[kind], **_QUIET)
        return box

    def _examples(self, kind: str, label: str) -> gr.Radio:
        """Ids to begin with, for someone who knows none."""
        return gr.Radio(self.examples[kind], label=label, elem_id=f"some-{kind}s")

    def _search(self, kind: str, text: Any = "") -> str:
        return options_view(kind, self.service.search(kind, text))

    def _connect(self) -> None:
        shown = [self.person, self.person_notice, self.person_view, self.item_part, self.best, self.item]
        shown += [self.answer_notice, self.answer_view, self.ratings, self.rated_item, self.stars]
        shown += [self.user, self.some_users, self.some_items]
        on_person = functools.partial(_listen, notice_at=self.person_notice, view=self.person_view, outputs=shown)
        on_person(
            [self.show.click, self.user.submit], lambda text: self._show(self.service.known_user(text)), [self.user]
        )
        on_person([self.some_users.input], lambda user: self._show(self.service.known_user(user)), [self.some_users])
        on_person([self.anyone.click], lambda: self._show(self.service.anyone()), [])
        on_person([self.rate.click], self._rate, [self.ratings, self.rated_item, self.stars])
        on_person([self.restart.click], self._restart, [])

        for examples, box in ((self.best, self.item), (self.some_items, self.rated_item)):
            examples.input(lambda item: item, examples, box, **_QUIET)
        notice_at, view = self.answer_notice, self.answer_view
        on_item = functools.partial(_listen, notice_at=notice_at, view=view, outputs=[notice_at, view])
        asked = [self.person, self.rating, self.features]
        triggers = [self.explain.click, self.item.submit, self.features.submit]
        on_item(triggers, self._explain, [*asked, self.item])
        on_item([self.unknown_item.click], functools.partial(self._explain, item=None), asked)

    def _show(self, person: Any) -> dict:
        best = self.service.recommend(person)
        return {
            self.person: person,
            self.user: person.user,
            self.some_users: person.user if person.user in self.examples["user"] else None,
            self.person_notice: spoken(f"{name_of(person)}: {len(best)} recommendations."),
            self.person_view: person_view(person),
            self.item_part: gr.update(visible=True),
            self.best: gr.update(choices=[(f"{item} ({rating:.2f})", item) for item, rating in best], value=best[0][0]),
            self.item: best[0][0],
            self.answer_notice: "",
            self.answer_view: "",
        }

    def _rate(self, ratings: dict[str, float], item: Any, stars: Any) -> dict:
        ratings = self.service.rate(ratings, item, stars)
        shown = self._show(self.service.visitor(ratings))
        return {**shown, self.ratings: ratings, self.rated_item: None, self.some_items: None, self.stars: None}

    def _restart(self) -> dict:
        return {
            self.person: None,
            self.person_notice: "",
            self.person_view: "",
            self.item_part: gr.update(visible=False),
            self.ratings: {},
            self.rated_item: None,
            self.some_items: None,
            self.stars: None,
        }

    def _explain(self, person: Any, rating: Any, features: Any, item: Any) -> dict:
        rating = None if rating == _PREDICTED else rating
        answer = self.service.explain(person, item, rating, features)
        said = f"{answer.explanation.explanation} Predicted rating {answer.explanation.predicted_rating:.2f}."
        return {self.answer_notice: spoken(said), self.answer_view: answer_view(person, answer)}


def _html(text: str, elem_id: str | None = None, classes: str = "gavamoe") -> gr.HTML:
    return gr.HTML(text, elem_id=elem_id, elem_classes=classes.split(), padding=False)


def _listen(
    triggers: list, handler: Callable, inputs: list, *, notice_at: gr.HTML, view: gr.HTML, outputs: list
) -> None:
    """Has a handler, which returns new values by component, answer events; what goes wrong is told in a sentence."""

    def answer(*values: Any) -> dict:
        try:
            return handler(*values)
        except DemoError as error:
            return {notice_at: notice(str(error))}
        except Exception:
            logger.exception("A request to the demo page failed")
            return {notice_at: notice(_FAILED)}

    gr.on(
        triggers,
        answer,
        inputs,
        outputs,
        show_progress_on=view,
        concurrency_limit=_MAX_AT_ONCE,
        # One limit for all of them, since it is one model that works
        concurrency_id="model",
        api_visibility="private",
    )
