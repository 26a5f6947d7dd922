"""The examples run, and what the README shows works: code blocks, commands, links, names of metrics."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from transformers import set_seed

from gavamoe_hf.cli.main import main as gavamoe
from gavamoe_hf.data import SyntheticConfig, SyntheticData, generate_synthetic
from gavamoe_hf.training import dry_run, pipeline
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.rating_trainer import RatingDataset

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
GUIDES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", *GUIDES),
    *("model_cards/README.md", "model_cards/quickstart/README.md"),
]
USER, ITEM = "user_003", "item_005"


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


# Whose Python needs more than a checkpoint is run by tests of its own, by `guide_snippets`
WITH_PYTHON = ["README.md", *(name for name in GUIDES if blocks(name, "python"))]
WITH_PYTHON.remove("docs/pretrained-llama.md")


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def synthetic() -> SyntheticData:
    return generate_synthetic(SyntheticConfig(num_users=24, num_items=12, records_per_user=6))


@pytest.fixture(scope="module")
def pair(synthetic):
    """Processor and model of a tiny run, untrained."""
    set_seed(0)
    args = ModelArguments(
        hidden_size=32,
        num_hidden_layers=2,
        moe_intermediate_size=16,
        vocab_size=400,
        vae_embedding_size=16,
        latent_size=8,
    )
    processor = build_processor(synthetic.records["train"], args)
    return processor, build_model(processor, args).eval()


@pytest.fixture(scope="module")
def checkpoint(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    processor, model = pair
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def remote_code_folder(tmp_path_factory, monkeypatch):
    """Remote code is copied to a folder of this run, not to the user's cache."""
    folder = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setenv("HF_MODULES_CACHE", folder)
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub", "transformers.utils"):
        if hasattr(sys.modules.get(module), "HF_MODULES_CACHE"):
            monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", folder)


# Scripts


# One process for all: nearly all of the time is the import of torch and TRL
HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, (path, stop.code)
    else:
        raise AssertionError(f"{path} went on after --help")
"""


def test_every_example_has_help():
    names = {"batch_explain", "explain", "quickstart", "reproduce_paper", "train_explanation", "train_rating"}
    assert {path.stem for path in EXAMPLES} == names
    command = [sys.executable, "-c", HELP, *map(str, EXAMPLES)]
    output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert output.returncode == 0, output.stderr
    for path in EXAMPLES:
        assert f"usage: {path.name} [-h]" in output.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_docstring_has_a_command_that_names_the_script(path):
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    assert f"    python examples/{path.name} --" in docstring


def test_batch_explain_adds_what_explain_says(pair, checkpoint, tmp_path, monkeypatch):
    processor, model = pair
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pairs = [
        {"user": user, "item": ITEM, "rating": rating, "features": features, "note": "kept"}
        for user, rating, features in ((USER, 5.0, ["sound"]), ("user_004", None, None), ("user_005", 1.0, []))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    script = load_example("batch_explain")
    files = {"pairs": str(tmp_path / "pairs.jsonl"), "output": str(tmp_path / "explained.jsonl")}
    script.main(script.ScriptArguments(model=str(checkpoint), batch_size=2, max_new_tokens=6, **files))
    rows = [json.loads(line) for line in (tmp_path / "explained.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row, given in zip(rows, pairs, strict=True):
        asked = {name: given[name] for name in ("user", "item", "rating", "features")}
        expected = model.explain(processor, **asked, do_sample=False, max_new_tokens=6)[0]
        assert row["note"] == "kept" and row["user"] == given["user"]
        assert row["explanation"] == expected.explanation and row["cluster"] == expected.cluster
        assert row["predicted_rating"] == pytest.approx(expected.predicted_rating, abs=1e-5)


def test_explain_prints_explanation_rating_cluster_and_experts(pair, checkpoint, capsys):
    processor, model = pair
    script = load_example("explain")
    options = {"features": ["sound"], "rating": 5.0, "max_new_tokens": 6}
    script.main(script.ScriptArguments(model=str(checkpoint), user=[USER], item=[ITEM], **options))
    output = capsys.readouterr().out
    expected = model.explain(
        processor, user=USER, item=ITEM, rating=5, features=["sound"], do_sample=False, max_new_tokens=6
    )[0]
    assert re.search(rf"^{USER}, {ITEM}$", output, re.MULTILINE)
    assert f"explanation       {expected.explanation}" in output
    assert "named features    sound" in output
    assert f"predicted rating  {expected.predicted_rating:.2f}" in output
    probability = expected.cluster_posterior[expected.cluster]
    assert f"cluster and gate  {expected.cluster} (probability {probability:.2f})" in output
    report = model.routing_report(processor.user_index(USER), processor.item_index(ITEM))
    for layer in range(2):
        share, expert = report.expert_share[0, layer].max(dim=-1)
        assert f"layer {layer}   experts {expert} ({share:.0%}), " in output


def test_explain_takes_known_pairs_by_default(pair, checkpoint, capsys):
    processor, _ = pair
    script = load_example("explain")
    script.main(script.ScriptArguments(model=str(checkpoint), num_pairs=2, max_new_tokens=2))
    output = capsys.readouterr().out
    assert output.count("by index") == 2
    assert f"{processor.users[1]}, {processor.items[1]}" in output


def test_quickstart_explains_without_the_package(checkpoint, capfd):
    quickstart = load_example("quickstart")
    quickstart.run_without_package(
        ROOT / "examples" / "explain.py", "--model", str(checkpoint), "--num_pairs", "1", "--max_new_tokens", "2"
    )
    assert "by index" in capfd.readouterr().out


def test_quickstart_blocks_the_package(tmp_path, capfd):
    quickstart = load_example("quickstart")
    script = tmp_path / "script.py"
    script.write_text("import gavamoe_hf\n", encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError):
        quickstart.run_without_package(script)
    assert "gavamoe_hf is blocked" in capfd.readouterr().err


def test_quickstart_replaces_its_own_run_alone(tmp_path):
    quickstart = load_example("quickstart")
    assert not quickstart.holds_own_run(tmp_path)
    for dataset, is_own in (("synthetic", True), ("reviews.csv", False)):
        (tmp_path / "run.json").write_text(json.dumps({"dataset": dataset}), encoding="utf-8")
        assert quickstart.holds_own_run(tmp_path) is is_own


def test_quickstart_prints_scores_of_the_run(checkpoint, tmp_path, monkeypatch, capsys):
    """All but training and the new process."""
    quickstart = load_example("quickstart")
    scores = {"rating_rmse": 0.5, "cluster_ari": 0.875}

    def train(data_args, model_args, rating_args, training_args):
        (Path(training_args.output_dir) / "metrics.json").write_text(json.dumps(scores), encoding="utf-8")

    monkeypatch.setattr(quickstart, "run_training", train)
    monkeypatch.setattr(quickstart, "run_without_package", lambda *args: None)
    classes = (pipeline.DataArguments, ModelArguments, pipeline.RatingArguments, quickstart.GaVaMoESFTConfig)
    arguments = quickstart.TrlParser(classes).parse_args_and_config(
        [*quickstart.OPTIONS, "--output_dir", str(tmp_path), "--num_clusters", "4"]
    )
    assert arguments[0].dataset == "synthetic" and arguments[1].num_clusters == "4"
    quickstart.main(*arguments)
    output = capsys.readouterr().out
    assert re.search(r"rating RMSE, stars +0\.500\n.*adjusted Rand index +0\.875\n", output)
    assert re.search(r"\n\d+ s, peak memory \d\.\d\d GiB\n", output)


def test_quickstart_knows_the_metrics(synthetic, pair):
    """The names in the score table, and in the guide's, are those of `metrics.json`."""
    processor, model = pair
    records = synthetic.records
    ratings = {split: RatingDataset.from_records(records[split], processor) for split in records}
    metrics, _ = pipeline.evaluate_run(model, processor, records, ratings, synthetic.truth)
    assert set(load_example("quickstart").SCORES) <= set(metrics)
    table = (
        (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8").split("| in `metrics.json` |")[1].split("\n\n")[0]
    )
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(metrics)


# README


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_of_the_documents_runs_in_order(document, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = blocks(document, "python")
    # A guide goes on from what the README loaded
    namespace: dict = {}
    served = checkpoint.parent / "served"
    if "outputs/served" in "".join(snippets) and not served.exists():
        assert gavamoe(["export", "--model", str(checkpoint), "--output_dir", str(served)]) == 0
    for snippet in blocks("README.md", "python") * (document != "README.md") + snippets:
        source = snippet.replace('"outputs/quickstart"', repr(str(checkpoint)))
        source = source.replace('"outputs/served"', repr(str(served)))
        exec(compile(source, document, "exec"), namespace)
    output = capsys.readouterr().out
    assert re.search(r"predicted rating \d\.\d, cluster \d", output)


def test_readme_quickstart_is_short():
    lines = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 15


def readme_commands() -> list[str]:
    found = [block for document in ("README.md", *GUIDES) for block in blocks(document, "bash")]
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(gavamoe \w+ --[^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    return [line for line in [*lines, *inline] if line.startswith("gavamoe ")]


def test_readme_has_commands():
    assert len(readme_commands()) >= 7


@pytest.mark.parametrize("command", [c for c in readme_commands() if c.startswith("gavamoe train")])
def test_readme_train_commands_parse(command, tmp_path, monkeypatch, capsys):
    (config,) = blocks("docs/your-data.md", "yaml")
    (tmp_path / "train.yaml").write_text(config, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runs = []

    def run_training(*arguments):
        runs.append(arguments)
        return {"rating_rmse": 1.0}

    monkeypatch.setattr(pipeline, "run_training", run_training)
    monkeypatch.setattr(dry_run, "describe_run", run_training)
    argv = shlex.split(command)[1:]
    if "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            gavamoe(argv)
        assert stop.value.code == 0
        return
    assert gavamoe(argv) == 0, capsys.readouterr().err
    data_args, model_args, rating_args, sft_args, lora_args = runs[0]
    assert data_args.dataset in ("reviews.csv", "records")
    assert lora_args.use_peft is ("--use_peft" in argv)
    assert data_args.overwrite_output_dir is ("--overwrite_output_dir" in argv)
    if "--config" in argv:
        options = yaml.safe_load(config)
        assert data_args.column_mapping == options["column_mapping"]
        assert model_args.hidden_size == options["hidden_size"]
        assert rating_args.rating_num_train_epochs == options["rating_num_train_epochs"]
        assert sft_args.learning_rate == options["learning_rate"]


@pytest.mark.parametrize("command", [c for c in readme_commands() if c.startswith("gavamoe explain")])
def test_readme_explain_commands_run(command, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_text(f"user,item\n{USER},{ITEM}\n", encoding="utf-8")
    replaced = {"outputs/reviews": str(checkpoint)}
    replaced |= {} if "--pairs" in command else {"A2EXAMPLE": USER, "B0EXAMPLE": ITEM}
    for theirs, ours in replaced.items():
        assert theirs in command
        command = command.replace(theirs, ours)
    assert gavamoe([*shlex.split(command)[1:], "--max_new_tokens", "3"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out or json.loads(Path("explanations.jsonl").read_text())["user"] == USER


def test_readme_options_exist(capsys):
    for command in ("train", "explain", "recommend"):
        with pytest.raises(SystemExit):
            gavamoe([command, "--help"])
    known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    documents = [ROOT / name for name in ("README.md", "docs/your-data.md", "docs/pretrained-llama.md")]
    mentioned = {option for path in documents for option in re.findall(r"`(--[a-z0-9_]+)", path.read_text("utf-8"))}
    assert mentioned, "no option is mentioned"
    assert mentioned <= known | {"--config", "--compare"}


def test_readme_names_what_departs_where_it_is():
    """Each class or function named in the table of departures exists."""
    paper = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    table = paper.split("## Where we depart from the paper")[1].split("\n## ")[0]
    places = [row.split("|")[-2] for row in table.splitlines() if row.startswith("|")][2:]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert len(places) >= 10
    for place in places:
        names = re.findall(r"`([^`]+)`", place)
        assert names, place
        for name in names:
            if name.endswith(".py"):
                assert list((ROOT / "src").rglob(name)), name
                continue
            first, _, member = name.partition(".")
            assert re.search(rf"(class|def) {first}\b", sources), name
            assert re.search(rf"(def {member}\b|^    {member}:)", sources, re.MULTILINE), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def links(page: Path) -> list[str]:
    """What a page of the site links to beside itself, and the site does not have."""
    targets = re.findall(r"""(?:href|src)="([^"#]+)""", page.read_text(encoding="utf-8"))
    relative = {target.partition("?")[0] for target in targets if not re.match(r"[a-z]+:|//", target)}
    return sorted(f"{page.name}: {target}" for target in relative if not (page.parent / target).exists())


def test_the_site_builds_with_every_guide(tmp_path, caplog):
    """`make docs`."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {Path(name).stem for name in GUIDES} <= pages
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert "Paper: 9,765 / 7,506 / 27,147" in reference
    # The marks of Hugging Face's docstrings are none of Google's
    shown = re.sub(r"<[^>]+>", "", reference)
    assert "*optional*" not in shown and "`" not in shown
    assert not re.search(r"\[<code>[^<]+</code>\](?!\()", reference)
    # 404.html may stand for any page, and has absolute links alone
    dead = [target for name in sorted(pages - {"404"}) for target in links(tmp_path / "site" / f"{name}.html")]
    assert dead == []
    named = {name for entry in config.nav for name in entry.values()}
    assert {f"docs/{name}" for name in named} == set(GUIDES)


def test_extras_that_are_named_exist_and_install_in_a_checkout():
    """Of this package: it is on no index, so that `pip install gavamoe-hf[demo]` finds nothing."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = [*(ROOT / "src").rglob("*.py"), *map(ROOT.joinpath, DOCUMENTS)]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    assert [path for path, text in texts.items() if re.search(r"pip install \"?gavamoe-hf", text)] == []
    named = {extra for text in texts.values() for extra in re.findall(r'install_hint\(["\'](\w+)["\']\)', text)}
    lists = [found for text in texts.values() for found in re.findall(r'pip install [^`\n]*"\.\[([\w,]+)\]"', text)]
    assert len(named) >= 6 and named | {extra for extras in lists for extra in extras.split(",")} <= set(extras)


def test_tree_in_contributing_is_true():
    tree = blocks("CONTRIBUTING.md", "")[0]
    package = ROOT / "src" / "gavamoe_hf"
    named = set(re.findall(r"\w+\.py", tree))
    existing = {path.name for path in package.rglob("*.py")}
    assert named <= existing | {"references.py", "run.py"}
    # All modules but those of the folders that the tree sums up in a line
    summed_up = {path.name for folder in ("evaluation", "cli") for path in (package / folder).glob("*.py")}
    assert existing - summed_up - {"version.py"} <= named
