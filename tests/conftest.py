"""Shared fixtures: no network, one thread, tiny random models whose clusters and gates matter."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For the processes that tests start, as below for this one
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from references import TINY_MODEL, spread_clusters, tiny_model, train_tiny_tokenizer

from gavamoe_hf import GaVaMoEForCausalLM, GaVaMoEProcessor
from gavamoe_hf.data import SyntheticConfig, SyntheticData, generate_synthetic
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor

# The models here are so small that a second thread only costs.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model() -> GaVaMoEForCausalLM:
    """In evaluation mode, with pairs of all three clusters. Shared by a module: tests that change it copy it."""
    return spread_clusters(tiny_model()).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tiny_tokenizer()


@pytest.fixture(scope="session")
def planted() -> SyntheticData:
    """A few hundred records, for tests that train on them or read them."""
    return generate_synthetic(SyntheticConfig(num_users=30, num_items=15, records_per_user=8))


@pytest.fixture
def processor(tokenizer) -> GaVaMoEProcessor:
    return GaVaMoEProcessor(
        tokenizer,
        users=[f"U{number}" for number in range(8)],
        items=[f"I{number}" for number in range(9)],
        item_features=[["sound", "price"], ["strings"], *[[] for _ in range(7)]],
    )


@pytest.fixture
def tiny(planted):
    """A processor and an untrained model whose rating model is free of noise, so that losses can be compared."""
    torch.manual_seed(0)
    arguments = ModelArguments(**TINY_MODEL, vae_dropout=0.0, vae_id_dropout=0.0, vocab_size=600)
    processor = build_processor(planted.records["train"], arguments)
    return processor, build_model(processor, arguments)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with an empty profile, at a phone's width."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not on this machine (Debian: chromium chromium-driver)")
    pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    switches = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for switch in [*switches.split(), "disable-sync", f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{switch}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    browser = Chrome(options=options, service=Service(driver))
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield browser
    browser.quit()
