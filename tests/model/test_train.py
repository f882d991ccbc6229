"""`python -m model.train`: a run, what it writes, resuming, starting from a checkpoint, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from model import DeepSeek
from model.checkpoint import Checkpoint, write_checkpoint
from model.config import Config
from model.evaluate import bits_per_byte
from model.train import Options, layout_of, main, run_folder, scored_tokens
from model.training.recipe import Recipe
from model.training.report import smoothed
from tests.models import randomize, stored_tensors

ROOT = Path(__file__).parents[2]
LINE = "for number in range({0}):\n    print(number, {0})\n"
TOY = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "vocab_size": 256}
SIZES = ("--batch", "2", "--window", "48")


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder of text; some of its files are held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(80):
        (folder / f"{number}.py").write_text(LINE.format(number) * 60)
    return folder


@pytest.fixture
def toy_config(make_config, tmp_path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(make_config(**TOY).to_dict()))
    return file


@pytest.fixture
def train():
    """Runs the command in this process; returns its exit code and output."""
    import typer

    app = typer.Typer()
    app.command()(main)

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.mark.slow
def test_run_writes_model_log_and_pictures(train, text, toy_config, tmp_path):
    out = tmp_path / "run"
    options = ("--data", text, "--config", toy_config, "--out", out, *SIZES)
    code, output = train(*options, "--steps", 12, "--evaluate-every", 6)
    assert code == 0 and "tokens" in output
    assert {"run.json", "log.jsonl", "loss.png", "load.png", "checkpoints", "model"} <= {
        file.name for file in out.iterdir()
    }
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "main" in row] == [*range(1, 13)]
    scores = [row["held_out"] for row in rows if "held_out" in row]
    assert len(scores) == 2 and scores[1] < scores[0] < 5.6
    metrics = json.loads((out / "model" / "metrics.json").read_text())
    assert metrics["steps"] == 12 and metrics["recipe"]["precision"] == "fp8"
    model = DeepSeek.from_pretrained(out / "model", dtype=torch.float32)
    heldout = (out / "model" / "heldout.txt").read_bytes()
    stored = metrics["held_out_bits_per_byte_fp8"]
    assert bits_per_byte(model, heldout, 48) == stored
    assert metrics["held_out_bits_per_byte_fp32"] == pytest.approx(stored, rel=0.01)
    assert f"{stored:.4f}" in (out / "model" / "README.md").read_text()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["main"] for row in rows if "main" in row]


def scores(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["held_out"] for row in rows if "held_out" in row]


@pytest.mark.slow
def test_resumed_run_keeps_recipe_and_losses(train, text, toy_config, tmp_path, monkeypatch):
    """Stopped after step 4, the run goes on with the options that it was started with."""
    options = ("--data", text, "--config", toy_config, *SIZES, "--steps", 8)
    options += ("--evaluate-every", 2)
    assert train(*options, "--out", tmp_path / "whole")[0] == 0
    from model.training.run import Run

    real = Run.take_step

    def stop_at_five(run):
        if run.step == 4:
            raise OSError("stopped by the test")
        return real(run)

    monkeypatch.setattr(Run, "take_step", stop_at_five)
    code, output = train(*options, "--out", tmp_path / "halves")
    assert code == 2 and "stopped by the test" in output
    monkeypatch.setattr(Run, "take_step", real)
    assert train("--out", tmp_path / "halves", "--resume")[0] == 0
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert scores(tmp_path / "halves") == scores(tmp_path / "whole")
    whole, halves = (Checkpoint.open(tmp_path / name / "model") for name in ("whole", "halves"))
    for name in whole.stored:
        assert torch.equal(whole._read(name, False), halves._read(name, False)), name


def test_model_of_transformers_is_trained_and_loaded_again(train, text, tmp_path):
    """save_pretrained, two steps, from_pretrained: both give the logits of the trained weights."""
    transformers = pytest.importorskip("transformers")
    values = {**vars(make_plain_config()), "num_nextn_predict_layers": 0, "num_key_value_heads": 3}
    names = transformers.DeepseekV3Config().to_dict().keys()
    config = transformers.DeepseekV3Config(
        **{k: v for k, v in values.items() if k in names and v is not None}
    )
    before = transformers.DeepseekV3ForCausalLM(config).eval()
    randomize(before)
    for name, bias in before.named_buffers():
        if name.endswith("correction_bias"):
            bias.abs_()  # transformers prefers a masked expert to a score below 0
    before.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text("{}")
    options = (
        "--checkpoint",
        tmp_path / "source",
        "--data",
        text,
        "--out",
        tmp_path / "run",
        *SIZES,
    )
    code, output = train(*options, "--steps", 2, "--learning-rate", "1e-3", "--warmup", 0)
    assert code == 0, output
    folder = tmp_path / "run" / "model"
    assert (folder / "generation_config.json").read_text() == "{}"
    assert Checkpoint.open(folder).config.quantization_config is None
    load = transformers.DeepseekV3ForCausalLM.from_pretrained
    after = load(folder, dtype=torch.float32).eval()
    tokens = torch.randint(256, (2, 30))
    with torch.no_grad():
        logits = after(tokens).logits
        moved = (logits - before(tokens).logits).abs().max()
    model = DeepSeek.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=0)
    assert moved > 1e-2


def make_plain_config() -> Config:
    from tests.model.conftest import small_config

    return small_config(**TOY)


def test_fp8_checkpoint_stays_fp8(train, text, make_plain, tmp_path):
    plain = make_plain(make_plain_config())
    quantized = {
        **vars(plain.config),
        "quantization_config": Config.preset("deepseek-v3").quantization_config,
    }
    write_checkpoint(tmp_path / "source", Config(**quantized), stored_tensors(plain))
    options = ("--checkpoint", tmp_path / "source", "--data", text, "--out", tmp_path / "run")
    code, output = train(*options, *SIZES, "--steps", 1, "--learning-rate", "1e-4")
    assert code == 0, output
    trained = Checkpoint.open(tmp_path / "run" / "model")
    assert trained.stored["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == "F8_E4M3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "absent"), "absent: no such folder"),
        (("--checkpoint", "absent"), "absent: no such directory"),
        (("--config", "x", "--checkpoint", "x"), "--config and --checkpoint: expected one"),
        (("--config", "toy.json", "--window", "129"), "max_position_embeddings = 128, got 129"),
        (("--data", "empty"), "empty: no text file in it"),
        (("--data", "short"), "expected more than window"),
        (("--experts", "2"), "Layout: experts"),
        (("--tensor", "2"), "expected a divisor of the 1 processes, got 2"),
    ],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_wrong_option_is_one_line(arguments, message, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.json").write_text(json.dumps(make_plain_config().to_dict()))
    for name in ("empty", "short"):
        Path(name).mkdir()
    Path("short", "a.txt").write_text("short")
    code, output = train(*arguments, "--out", "run", "--steps", 1)
    assert code == 2 and message in output.replace("\n", " ")


def test_one_file_is_held_out_at_its_end(train, toy_config, tmp_path):
    """No file of the folder is held out, so the end of the text is."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text(LINE.format(7) * 400)
    options = ("--data", tmp_path / "text", "--config", toy_config, "--out", tmp_path / "run")
    code, output = train(*options, *SIZES, "--steps", 1)
    assert code == 0, output
    metrics = json.loads((tmp_path / "run" / "model" / "metrics.json").read_text())
    size = len(LINE.format(7) * 400) + 1
    assert metrics["held_out_bytes"] == int(0.03 * size)
    assert metrics["training_bytes"] == size - metrics["held_out_bytes"]


def test_resumed_run_refuses_its_options_and_other_text(train, text, toy_config, tmp_path):
    out = tmp_path / "run"
    options = ("--data", text, "--config", toy_config, "--out", out, *SIZES, "--steps", 1)
    assert train(*options)[0] == 0
    code, output = train("--out", out, "--resume", "--steps", 5)
    assert code == 2 and "--steps was given" in output
    (text / "0.py").write_text("changed")
    code, output = train("--out", out, "--resume")
    assert code == 2 and "text: sha256 is" in output.replace("\n", " ")


@pytest.mark.slow
def test_files_of_the_run_are_not_trained_on(train, text, toy_config):
    """A run inside the folder of text reads the same text again when it is resumed."""
    options = ("--data", text, "--config", toy_config, "--out", text / "run", *SIZES)
    assert train(*options, "--steps", 1)[0] == 0
    code, output = train("--out", text / "run", "--resume")
    assert code == 0, output


@pytest.mark.parametrize(
    ("tokens", "scored"), [(0, 0), (48, 0), (49, 49), (100, 97), (20000, 16369)], ids=str
)
def test_whole_windows_are_scored(tokens, scored):
    assert len(scored_tokens(torch.zeros(tokens, dtype=torch.uint8), 48)) == scored


def test_run_folder_is_new_by_default():
    folder = run_folder(None, resume=False)
    assert folder.parent.name == "runs" and not folder.exists()


def test_run_folder_with_files_needs_resume(tmp_path):
    Options(None, None, None, Recipe(steps=3)).save(tmp_path)
    with pytest.raises(Exception, match="not empty; --resume"):
        run_folder(tmp_path, resume=False)
    assert run_folder(tmp_path, resume=True) == tmp_path
    assert Options.load(tmp_path).recipe == Recipe(steps=3)


def test_resume_needs_a_run(tmp_path):
    for out in (None, tmp_path):
        with pytest.raises(Exception, match="no run to resume"):
            run_folder(out, resume=True)


def test_damaged_options_are_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: not the options of a run"):
        Options.load(tmp_path)


def test_layout_of_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    layout = layout_of(tensor=2, context=2, experts=4)
    assert (layout.data, layout.tensor, layout.context, layout.experts) == (2, 2, 2, 4)


def test_smoothed_starts_at_the_first_value():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0], 0.5) == pytest.approx([1.0, 5 / 3])


@pytest.mark.proof
def test_torchrun(train, text, toy_config, tmp_path):
    """Two processes that divide sequences and experts: one log, one model, one folder.

    The losses and scores are those of one process.
    """
    options = ["--data", text, "--config", toy_config, *SIZES, "--steps", "3"]
    options += ["--precision", "fp32", "--evaluate-every", "3"]
    assert train(*options, "--out", tmp_path / "one")[0] == 0
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "model.train", *options, "--out", tmp_path / "two"]
    command += ["--context", "2", "--experts", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (scores(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 1 and two == pytest.approx(one, rel=1e-4)
    assert DeepSeek.from_pretrained(tmp_path / "two" / "model", dtype=torch.float32)
