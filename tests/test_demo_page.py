"""The demo page in a real browser at a phone's width, by keyboard: from wrong input and a known user to a new one."""

import socket
import urllib.error
import urllib.request

import pytest
from datasets import Dataset
from references import spread_clusters, tiny_model

from gavamoe_hf import GaVaMoEProcessor
from gavamoe_hf.demo import DemoService

pytest.importorskip("gradio", reason="gradio is not installed (the extra `demo`)")

WIDTH = 360
HOSTILE = "<img src=x onerror='window.isHacked = true'> ${window.isHacked = true} {{window.isHacked = true}} &lt;b&gt;"
USERS = [f"user_{number:05}" for number in range(3_000)]


@pytest.fixture
def service(tokenizer):
    """An untrained model that knows more users than a browser should."""
    users = [*(f"U{number}" for number in range(8)), *USERS]
    processor = GaVaMoEProcessor(
        tokenizer, users=users, items=[f"I{number}" for number in range(9)], item_features=[["sound"]] * 9
    )
    model = tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4, num_users=len(users))
    rows = [("U0", "I0", 5.0, "Rich sound. " + HOSTILE), ("U0", "I4", 1.0, "It broke.")]
    records = [{"user": user, "item": item, "rating": rating, "explanation": text} for user, item, rating, text in rows]
    return DemoService(spread_clusters(model).eval(), processor, Dataset.from_list(records), top_k=4, max_new_tokens=8)


@pytest.fixture
def address(service):
    from gavamoe_hf.demo.page import build_page, launch_page

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    blocks = build_page(service, title="Strings & things")
    launch_page(blocks, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}/"
    blocks.close()


class Visitor:
    """Someone with a phone and a keyboard."""

    def __init__(self, browser):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        self.browser, self.keys, self.chain = browser, Keys, ActionChains(browser, duration=0)

    def press(self, *keys):
        self.chain.send_keys(*keys).perform()

    def tab_to(self, name):
        """Tabs on until the focus is at what a screen reader calls by this name."""
        for _ in range(60):
            self.press(self.keys.TAB)
            focused = self.browser.switch_to.active_element
            # What explains a box follows its label
            if focused.accessible_name.strip().startswith(name):
                return focused
        pytest.fail(f"no way to {name!r} by the Tab key")

    def type_over(self, *keys):
        self.chain.key_down(self.keys.CONTROL).send_keys("a").key_up(self.keys.CONTROL).send_keys(*keys).perform()

    def type_into(self, name, *keys):
        self.tab_to(name)
        self.type_over(*keys)

    def push(self, name):
        self.tab_to(name)
        self.press(self.keys.ENTER)

    def rate(self, item, rating):
        self.type_into("Item to rate", item)
        # The first of the group, and as many steps to the right as there are lower ratings
        self.press(self.keys.TAB, self.keys.SPACE, *[self.keys.ARROW_RIGHT] * (rating - 1))
        self.push("Add rating")

    def read(self, element_id):
        return self.browser.find_element("id", element_id).text

    def wait_for(self, element_id, text):
        self.wait(lambda: text in self.read(element_id), f"{text!r} does not appear in {element_id}")

    def wait(self, condition, message=""):
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.browser, 60).until(lambda _: condition(), message)

    def table(self, css_class):
        """Rows of cells of a table of the answer."""
        script = """return [...document.querySelectorAll(`#answer-view .${arguments[0]} tbody tr`)]
            .map((row) => [...row.cells].map((cell) => cell.textContent))"""
        return self.browser.execute_script(script, css_class)

    def check_fit(self):
        """That nothing is wider than the screen, and everything has a name."""
        assert self.browser.execute_script("return document.documentElement.scrollWidth") == WIDTH
        script = (
            "return [...document.querySelectorAll('.scroll')].filter((part) => part.scrollWidth > part.clientWidth)"
        )
        assert self.browser.execute_script(script) == []
        fields = self.browser.find_elements("css selector", "input, textarea, select, button:not([tabindex='-1'])")
        shown = [field for field in fields if field.is_displayed()]
        assert [field.get_attribute("outerHTML") for field in shown if not field.accessible_name.strip()] == []

    def check_answer(self, answer):
        """That the page says what the service does."""
        explained, view = answer.explanation, self.read("answer-view")
        # White space as a browser shows it
        assert " ".join(explained.explanation.split()) in " ".join(view.split())
        assert f"{explained.predicted_rating:.2f}" in view
        probabilities = [row[1] for row in self.table("bars")]
        assert probabilities == [f"{probability:.1%}" for probability in explained.cluster_posterior]
        heat = [[str(layer), *(f"{100 * s:.0f}" for s in shares)] for layer, shares in enumerate(answer.expert_share)]
        assert self.table("heat") == heat and len(heat) == 2 and len(heat[0]) == 5


@pytest.mark.slow
def test_page_in_a_browser(browser, service, address, monkeypatch):
    metrics = {"width": WIDTH, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    visitor = Visitor(browser)
    browser.get(address)
    visitor.wait(lambda: browser.find_elements("id", "person-view"))
    assert browser.find_element("tag name", "h1").text == "Strings & things"
    visitor.check_fit()

    # Someone who knows no id begins with one that is there
    visitor.tab_to("U0")
    visitor.press(visitor.keys.SPACE)
    visitor.wait_for("person-view", "User U0")
    visitor.wait(lambda: browser.find_element("css selector", "#user input").get_attribute("value") == "U0")
    visitor.check_fit()

    # Of 3,008 ids the browser has a few, and those that match what is typed
    assert len(browser.page_source) < 300_000
    visitor.type_into("User", "2990")
    suggested = "return [...document.activeElement.list.options].map((option) => option.value)"
    visitor.wait(lambda: browser.execute_script(suggested) == [USERS[2_990]])

    # Someone who is not known: a sentence, and a way on
    visitor.type_over("nobody", visitor.keys.ENTER)
    visitor.wait_for("person-notice", "The user “nobody” is not among the 3,008 users that the model knows.")
    assert browser.find_element("css selector", "#person-notice p").aria_role == "alert"
    visitor.push("Show someone unknown instead")
    visitor.wait_for("person-view", "Someone of whom nothing is known")
    assert browser.find_elements("css selector", "[role=alert]") == []

    # A known user: history, recommendations, explanation
    visitor.type_into("User", "U0", visitor.keys.ENTER)
    visitor.wait_for("person-view", "User U0")
    assert "Rich sound. " + HOSTILE in visitor.read("person-view")
    best = [f"{item} ({rating:.2f})" for item, rating in service.recommend(service.known_user("U0"))]
    visitor.wait(lambda: [label.text for label in browser.find_elements("css selector", "#best label")] == best)
    # The second one: a group of choices is one stop, and arrow keys choose in it
    visitor.tab_to(best[0])
    visitor.press(visitor.keys.ARROW_DOWN)
    chosen = best[1].split()[0]
    visitor.wait(lambda: browser.find_element("css selector", "#item input").get_attribute("value") == chosen)
    visitor.press(visitor.keys.TAB)
    assert browser.switch_to.active_element.accessible_name.startswith("Item to explain")
    assert browser.find_element("id", "best").accessible_name == "Recommended, with predicted ratings"
    visitor.push("Explain")
    visitor.wait_for("answer-view", f"Why {chosen}?")
    visitor.check_answer(service.explain(service.known_user("U0"), chosen))
    visitor.type_into("Item to explain", "I99", visitor.keys.ENTER)
    visitor.wait_for("answer-notice", "The item “I99” is not among the 9 items that the model knows.")
    visitor.push("Explain an unknown item instead")
    visitor.wait_for("answer-view", "Why an item of which nothing is known?")
    visitor.check_answer(service.explain(service.known_user("U0"), None))
    visitor.check_fit()

    # A new user, from the first rating to a new explanation
    visitor.push("New user")
    visitor.push("Add rating")
    visitor.wait_for("person-notice", "Please choose or type the id of an item.")
    visitor.rate("I1", 5)
    visitor.wait_for("person-view", "New user, 1 rating")
    assert visitor.read("answer-view") == ""
    visitor.type_into("Item to explain", "I3", visitor.keys.ENTER)
    visitor.wait_for("answer-view", "Why I3?")
    first = service.explain(service.visitor({"I1": 5.0}), "I3")
    visitor.check_answer(first)
    visitor.rate("I2", 1)
    visitor.wait_for("person-view", "New user, 2 ratings")
    visitor.type_into("Item to explain", "I3", visitor.keys.ENTER)
    visitor.wait_for("answer-view", "Why I3?")
    second = service.explain(service.visitor({"I1": 5.0, "I2": 1.0}), "I3")
    visitor.check_answer(second)
    assert first.explanation.cluster_posterior != second.explanation.cluster_posterior
    visitor.check_fit()

    # What nobody foresaw is told without its inside
    monkeypatch.setattr(service, "explain", lambda *_: 1 / 0)
    visitor.push("Explain")
    visitor.wait_for("answer-notice", "Something went wrong on the server.")
    assert "ZeroDivisionError" not in browser.page_source and "division" not in browser.page_source

    # Nothing of its texts ran, and nothing came from elsewhere
    assert browser.execute_script("return window.isHacked") is None
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and [url for url in loaded if not url.startswith((address, "data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_nobody_can_leave_a_file(address, tmp_path, monkeypatch):
    """Gradio has a route for uploads whether a page has a place for them or not."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
        + b"a" * 10_000
        + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(f"{address.rstrip('/')}/gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413 and not any(path.is_file() for path in tmp_path.rglob("*"))
