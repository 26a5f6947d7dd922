"""The parts of the demo page that are read: plain HTML tables, in which every colour stands beside its number."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .service import Answer, Person, Rated

# Most of a history that is shown
_NUM_RATED, _TEXT_LENGTH = 50, 160
# Of these, what is shown at once
_NUM_FIRST = 5
# Of the accent colour in the darkest cell of the heat map: from here on dark text would be hard to read on it
_DARKEST = 0.7

STYLE = """
.gavamoe-options, .gavamoe-notice:not(:has(p)) { display: none; }
.gavamoe h1, .gavamoe h2, .gavamoe h3, .gavamoe h4 { line-height: 1.25; margin: .25rem 0 .5rem; }
.gavamoe h1 { font-size: 1.6rem; } .gavamoe h2 { font-size: 1.25rem; } .gavamoe h3 { font-size: 1.1rem; }
.gavamoe p { margin: 0 0 .5rem; max-width: 46rem; overflow-wrap: anywhere; }
.gavamoe .quiet { color: var(--body-text-color-subdued); font-size: .9rem; }
.gavamoe [role=alert] { padding: .6rem .8rem; margin: 0; border: 2px solid #b3261e; border-radius: .5rem; }
.gavamoe .unseen { position: absolute; width: 1px; height: 1px; margin: 0; overflow: hidden; clip-path: inset(50%); }
.gavamoe blockquote { margin: .25rem 0 1rem; padding: .25rem 0 .25rem .8rem; border-left: 4px solid #0b57d0;
  font-size: 1.15rem; line-height: 1.5; overflow-wrap: anywhere; }
.gavamoe dl { display: grid; grid-template-columns: auto 1fr; gap: .25rem 1rem; margin: 0 0 1rem; }
.gavamoe dt { color: var(--body-text-color-subdued); } .gavamoe dd { margin: 0; overflow-wrap: anywhere; }
.gavamoe table { border-collapse: collapse; margin: 0; font-size: .9rem; }
.gavamoe table, .gavamoe tr { border: 0 !important; }
.gavamoe th, .gavamoe td { padding: .3rem .5rem; text-align: left; vertical-align: top; overflow-wrap: break-word;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
.gavamoe .number { text-align: right; white-space: nowrap; }
.gavamoe .scroll { overflow: auto; max-height: 80vh; margin: 0 0 1rem; }
.gavamoe .history th { max-width: 9rem; }
.gavamoe summary { cursor: pointer; margin: 0 0 .5rem; }
@media (max-width: 640px) {
  .gavamoe .history thead tr, .gavamoe .history tbody tr { display: grid; grid-template-columns: 1fr auto; }
  .gavamoe .history th { max-width: none; overflow-wrap: anywhere; }
  .gavamoe .history td:nth-child(3), .gavamoe .history thead th:nth-child(3) { grid-column: 1 / -1; padding-top: 0; }
}
.gavamoe .bars { width: 100%; max-width: 32rem; margin: 0 0 1rem; } .gavamoe .bars th { white-space: nowrap; }
.gavamoe .bars td:last-child { width: 60%; vertical-align: middle; }
.gavamoe .bar { display: block; height: .8rem; min-width: 2px; border-radius: .2rem; background: #0b57d0; }
.gavamoe .chosen { font-weight: 700; }
.gavamoe .heat thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.gavamoe .heat tbody tr { display: flex; flex-wrap: wrap; margin: 0 0 .5rem; }
.gavamoe .heat th, .gavamoe .heat td { padding: .15rem .25rem; border: 0 !important; }
.gavamoe .heat th[scope=row] { flex: 0 0 100%; } .gavamoe .heat th[scope=row]::before { content: "Layer "; }
.gavamoe .heat td { color: #1b1f24; width: 2.6rem; text-align: center; }
.gavamoe .heat td::before { content: attr(data-expert); display: block; font-size: .75rem; }
.gavamoe :focus-visible { outline: 3px solid #0b57d0; outline-offset: 2px; }
"""


def notice(sentence: str) -> str:
    """A sentence about what went wrong."""
    return f'<p role="alert">{escape(sentence)}</p>'


def spoken(sentence: str) -> str:
    """What screen readers say of a new part of the page, which the others see."""
    return f'<p class="unseen">{escape(sentence)}</p>'


def options_view(kind: str, ids: Sequence[str]) -> str:
    """The suggestions for boxes that ask for a `kind`, `"user"` or `"item"`."""
    options = "".join(f'<option value="{escape(raw)}"></option>' for raw in ids)
    return f'<datalist id="{kind}-options">{options}</datalist>'


def person_view(person: Person) -> str:
    """Who it is, and what they rated."""
    return f"<h3>{escape(name_of(person))}</h3>{_history(person.history)}"


def answer_view(person: Person, answer: Answer) -> str:
    """The explanation, what it rests on, and the way that it took."""
    explained = answer.explanation
    text = explained.explanation
    quote = f"<blockquote>{escape(text)}</blockquote>" if text else "<p>The model had nothing to say of this pair.</p>"
    item = "an item of which nothing is known" if explained.item is None else explained.item
    experience = f"a {answer.sentiment} experience"
    if explained.rating != explained.predicted_rating:
        experience += f", given the rating {explained.rating:g}"
    facts = {
        "For": name_of(person),
        "Predicted rating": f"{explained.predicted_rating:.2f}",
        "Explained as": experience,
        "Features named": ", ".join(explained.features) or "none",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        f"<h3>Why {escape(item)}?</h3>{quote}<dl>{listed}</dl>"
        f"{_clusters(explained.cluster_posterior, explained.cluster)}{_experts(answer.expert_share)}"
    )


def name_of(person: Person) -> str:
    """What the page calls someone."""
    if person.kind == "user":
        return f"User {person.user}"
    if person.kind == "anyone":
        return "Someone of whom nothing is known"
    return f"New user, {len(person.history)} rating{'s' * (len(person.history) != 1)}"


def _history(history: Sequence[Rated]) -> str:
    if not history:
        return '<p class="quiet">No history to show.</p>'
    with_texts = any(rated.explanation or rated.features for rated in history)
    rows = []
    for rated in history[:_NUM_RATED]:
        cells = f'<th scope="row">{escape(rated.item)}</th><td class="number">{rated.rating:g}</td>'
        if with_texts:
            text = rated.explanation or ", ".join(rated.features)
            cells += f"<td>{escape(text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH] + '…')}</td>"
        rows.append(f"<tr>{cells}</tr>")
    about = f"{len(history)} rated" if len(history) <= _NUM_RATED else f"{_NUM_RATED} of {len(history)} rated"
    head = '<th scope="col">Item</th><th scope="col" class="number">Rating</th>'
    head += '<th scope="col">What they said</th>' * with_texts
    others = rows[_NUM_FIRST:]
    if others:
        table = f'<table class="history" aria-label="More of the history"><thead><tr>{head}</tr></thead>'
        table += f"<tbody>{''.join(others)}</tbody></table>"
        others = [f"<details><summary>{len(others)} more</summary>{table}</details>"]
    return _table("history", "History", f"{about}.", head, rows[:_NUM_FIRST]) + "".join(others)


def _table(name: str, title: str, about: str, head: str, rows: Sequence[str]) -> str:
    """A table under its title, which scrolls by itself, with the arrow keys too, where it is larger than its place."""
    return (
        f'<h4 id="{name}-title">{title}</h4><p class="quiet">{about}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-title">'
        f'<table class="{name}" aria-labelledby="{name}-title"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _clusters(posterior: Sequence[float], chosen: int) -> str:
    """A row for each cluster: its probability, and a bar of that length."""
    rows = [
        f'<tr{" class=chosen" * (cluster == chosen)}><th scope="row">{cluster}{" (taken)" * (cluster == chosen)}</th>'
        f'<td class="number">{probability:.1%}</td>'
        f'<td><span class="bar" aria-hidden="true" style="width:{100 * probability:.1f}%"></span></td></tr>'
        for cluster, probability in enumerate(posterior)
    ]
    about = "How probable each cluster is for this pair. The most probable one chooses the gate."
    head = '<th scope="col">Cluster</th><th scope="col" class="number">Probability</th><td></td>'
    return _table("bars", "Clusters", about, head, rows)


def _experts(expert_share: list[list[float]] | None) -> str:
    """The heat map: a row for each layer, a column for each expert, darker for a larger share."""
    if expert_share is None:
        return '<p class="quiet">This model has no experts: its layers are dense.</p>'
    largest = max(map(max, expert_share)) or 1.0
    head = '<th scope="col">Layer</th>'
    head += "".join(f'<th scope="col">{expert}</th>' for expert in range(len(expert_share[0])))
    rows = [
        f'<tr><th scope="row">{layer}</th>'
        + "".join(_heat(expert, share, largest) for expert, share in enumerate(shares))
        + "</tr>"
        for layer, shares in enumerate(expert_share)
    ]
    about = (
        "Of each layer, the share of the work that each expert took over prompt and explanation, in percent, under the "
        "expert's number. Darker is more."
    )
    return _table("heat", "Experts", about, head, rows)


def _heat(expert: int, share: float, largest: float) -> str:
    blue = f"color-mix(in srgb, #0b57d0 {100 * _DARKEST * share / largest:.0f}%, white)"
    return f'<td data-expert="{expert}" style="background:{blue}">{100 * share:.0f}</td>'
