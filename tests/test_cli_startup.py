"""What an import of the package brings: registration for everybody, and no heavy library for a command's help."""

import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers
from references import spread_clusters, tiny_model

import gavamoe_hf
from gavamoe_hf import GaVaMoEProcessor
from gavamoe_hf.cli import arguments

# As an installer writes it
COMMAND = "import sys\nfrom gavamoe_hf.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
HEAVY = re.compile(r"\|\s+(torch|transformers|datasets|trl|peft|numpy)$", re.MULTILINE)


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "gavamoe"
    path.write_text(COMMAND)
    return [str(path)]


@pytest.fixture
def checkpoint(processor, tokenizer, tmp_path):
    model = spread_clusters(tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4))
    model.config.stored_prompts = processor.stored_prompts()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def python(*options, cwd=None):
    command = [sys.executable, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=cwd)


@pytest.mark.parametrize(
    "options",
    ["", "explain", "recommend", "clusters", "evaluate", "human-study", "human-study draw", "human-study score"],
)
def test_help_imports_no_heavy_library(options, command):
    done = python("-X", "importtime", *command, *options.split(), "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: gavamoe " + options)
    assert re.search(r"\|\s+gavamoe_hf$", done.stderr, re.MULTILINE)
    assert HEAVY.findall(done.stderr) == []


def test_help_of_the_module_imports_no_heavy_library():
    done = python("-X", "importtime", "-m", "gavamoe_hf", "explain", "--help")
    assert done.returncode == 0 and "--max_new_tokens" in done.stdout
    assert HEAVY.findall(done.stderr) == []


def test_a_plain_import_registers(checkpoint):
    script = (
        "import sys, gavamoe_hf\n"
        "from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor\n"
        "for auto in (AutoModel, AutoModelForCausalLM, AutoProcessor):\n"
        "    loaded = auto.from_pretrained(sys.argv[1])\n"
        "    print(type(loaded) is getattr(gavamoe_hf, type(loaded).__name__), type(loaded).__name__)\n"
    )
    done = python("-c", script, checkpoint)
    assert done.stdout.split("\n")[:3] == [
        "True GaVaMoEForCausalLM",
        "True GaVaMoEForCausalLM",
        "True GaVaMoEProcessor",
    ], done.stderr


def test_the_command_registers_before_it_runs(checkpoint, tmp_path):
    script = COMMAND.replace("sys.exit(main())", "print(main())\n    from transformers import AutoConfig\n    ")
    (tmp_path / "gavamoe").write_text(script + "print(AutoConfig.for_model('gavamoe').model_type)\n")
    options = ["--user", "U1", "--item", "I2", "--json", "--max_new_tokens", "2"]
    done = python("gavamoe", "explain", "--model", checkpoint, *options, cwd=tmp_path)
    explained, *rest = done.stdout.splitlines()
    assert json.loads(explained)["user"] == "U1" and rest == ["0", "gavamoe"], done.stderr


def test_names_in_the_process_of_the_command(tmp_path):
    (tmp_path / "gavamoe").write_text(
        "import sys, gavamoe_hf\n"
        "print(hasattr(gavamoe_hf, 'GaVaMoE'), 'torch' in sys.modules, gavamoe_hf.__version__)\n"
        "from gavamoe_hf import *\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('gavamoe')) is GaVaMoEConfig, set(gavamoe_hf.__all__) - set(globals()))\n"
    )
    done = python("gavamoe", cwd=tmp_path)
    expected = [f"False False {gavamoe_hf.__version__}", "True set()"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_every_public_name_is_there():
    lazy = list(gavamoe_hf._LAZY)
    assert sorted([*gavamoe_hf.auto.__all__, *lazy, "__version__"]) == sorted(gavamoe_hf.__all__)
    for name in gavamoe_hf.__all__:
        assert hasattr(gavamoe_hf, name)
    assert GaVaMoEProcessor is gavamoe_hf.auto.GaVaMoEProcessor


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/usr/bin/gavamoe", "explain"], ["python3", "/usr/bin/gavamoe", "explain"], True),
        (["bin/gavamoe"], ["python3", "-X", "importtime", "bin/gavamoe"], True),
        (["gavamoe-script.py"], ["python.exe", "gavamoe-script.py"], True),
        (["-m", "train"], ["python3", "-u", "-m", "gavamoe_hf", "train"], True),
        (["-m"], ["python3", "-m", "gavamoe_hf.cli.main"], True),
        # Of a package that imports this one
        (["-m", "train"], ["python3", "-m", "recommender.train", "train"], False),
        (["-m"], ["python3", "-mgavamoe_hf"], False),
        (["-c"], ["python3", "-c", "import gavamoe_hf"], False),
        (["train.py", "gavamoe"], ["python3", "train.py", "gavamoe"], False),
        (["gavamoe.py"], ["python3", "gavamoe.py"], False),
        # What multiprocessing spawns from the command
        (["/usr/bin/gavamoe", "train"], ["python3", "-c", "spawn_main()", "--multiprocessing-fork"], False),
        ([""], ["python3"], False),
        ([], ["python3"], False),
    ],
)
def test_the_command_is_told_from_others(argv, original, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert gavamoe_hf._is_command() is expected


@pytest.mark.parametrize("content", [None, "from .utils import nothing\n", "class OtherParser:\n    pass\n"])
def test_a_parser_that_moved_is_imported_the_ordinary_way(content, tmp_path, monkeypatch):
    assert arguments.HfArgumentParser is not transformers.HfArgumentParser
    if content is not None:
        (tmp_path / "hf_argparser.py").write_text(content)
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert arguments._load_parser() is transformers.HfArgumentParser
