"""What comes from outside is believed when it has been checked: files, numbers, the machine."""

import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from safetensors import numpy as safetensors

from nrgpt_jax import cli, credentials, disk, evaluate, interrupts, sample
from nrgpt_jax.datasets import listops
from nrgpt_jax.datasets.tokenizers import ByteTokenizer, SymbolTokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation import exported
from nrgpt_jax.runs import checksums
from nrgpt_jax.runs.directory import load_config
from nrgpt_jax.runs.pretrained import WEIGHTS_FILE, load_pretrained
from nrgpt_jax.runs.record_checks import check_tokenizer
from studies.reliability.contents import small, without_checksums

# Files of a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 0, r"config\.json: model\.num_heads=0 is not possible.*; restore"),
        ("context_length", 10**9, r"config\.json: model\.context_length=1000000000"),
        ("embed_dim", "8", r"Expected `int`, got `str` - at `\$\.model\.embed_dim`"),
        ("widht", 8, r"unknown field `widht` - at `\$\.model`"),
    ],
)
def test_a_recorded_field_that_is_not_possible_is_named(tmp_path, field, value, message):
    small(tmp_path)
    without_checksums(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["model"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


def test_a_tokenizer_fits_the_model(tmp_path):
    config = small(tmp_path).config
    with pytest.raises(UserError, match="256 symbols, and the model 12"):
        check_tokenizer(tmp_path, config, ByteTokenizer())
    config.data.tokenizer = "byte"
    with pytest.raises(UserError, match=r"kind symbol, and data\.tokenizer is byte"):
        check_tokenizer(tmp_path, config, SymbolTokenizer("abc"))
    config.data.name, config.model.vocab_size = "listops", 20
    symbols = listops.tokenizer(config.data.listops).vocabulary
    check_tokenizer(tmp_path, config, SymbolTokenizer(symbols))
    with pytest.raises(UserError, match="another order"):
        check_tokenizer(tmp_path, config, SymbolTokenizer(symbols[::-1]))


def test_every_file_of_an_exported_folder_is_verified(tmp_path):
    small(tmp_path)
    recorded = json.loads((tmp_path / checksums.FILE_NAME).read_text())["xxh3_128"]
    assert set(recorded) == {WEIGHTS_FILE, "config.json", "tokenizer.json"}
    for name in recorded:
        content = (tmp_path / name).read_bytes()
        flipped = bytearray(content)
        flipped[-9] ^= 1  # of a JSON file a space or a letter, of the others the last numbers
        for damage in (lambda path, new=flipped: path.write_bytes(new), os.remove):
            damage(tmp_path / name)
            with pytest.raises(UserError, match=rf"{name}.*export the run again"):
                load_pretrained(tmp_path)
            (tmp_path / name).write_bytes(content)
    load_pretrained(tmp_path)


def test_an_older_folder_opens_with_one_warning(tmp_path, monkeypatch):
    small(tmp_path)
    without_checksums(tmp_path)
    warned: list[tuple] = []
    monkeypatch.setattr(logging, "warning", lambda *message: warned.append(message))
    load_pretrained(tmp_path)
    assert [checksums.FILE_NAME in message for message in warned] == [True]
    arrays = safetensors.load_file(tmp_path / WEIGHTS_FILE)
    arrays["head/bias"] = np.full_like(arrays["head/bias"], np.nan)
    safetensors.save_file(arrays, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match="parameter head/bias is not finite"):
        load_pretrained(tmp_path)


def test_names_in_a_record_do_not_leave_the_folder(tmp_path):
    small(tmp_path)
    disk.write_json(tmp_path / checksums.FILE_NAME, {"xxh3_128": {"../secret": "0"}})
    with pytest.raises(UserError, match=r"its file .\.\./secret. is missing"):
        load_pretrained(tmp_path)


def test_the_exported_program_names_a_file_that_is_damaged(tmp_path, capsys):
    path = tmp_path / "prefill.jax_export"
    for content in (None, b"", b"foreign" * 100):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            exported.opened(exported.read_function, path)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path} cannot be read")
    with pytest.raises(SystemExit):
        exported.arguments(["1,x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "not UTF-8"), (b"\n\n", "holds no prompt"), (None, "cannot be read")],
)
def test_files_of_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    given: Any = SimpleNamespace(prompt=None, prompts_file=str(path))
    with pytest.raises(UserError, match=message):
        sample._prompts(given)


def test_a_text_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="not UTF-8"):
        ByteTokenizer().encode("a\udcff")


# Credentials ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hidden@host/x", "https://me:***@host/x"),
        ("s3://ID:hid/den@bucket/x", "s3://ID:***@bucket/x"),
        ("https://hidden@host/x", "https://***@host/x"),
        ("https://h/x?X-Amz-Signature=hidden&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("https://h/x?a=1&token=hidden", "https://h/x?a=1&token=***"),
        ("hf://datasets/me/x@revision", None),
        ("http://localhost:8080/a@b", None),
        ("gs://bucket/part-*.parquet?x=1", None),
    ],
)
def test_credentials_are_seen_and_never_shown(text, shown):
    assert credentials.masked(f"at {text}, then") == f"at {shown or text}, then"


# The machine ------------------------------------------------------------------------------------


def raising(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (raising(OSError(errno.ENOSPC, "No space left", "runs/x.json")), "runs/x.json: No space"),
        (raising(PermissionError(errno.EACCES, "Permission denied", "x")), "x: Permission denied"),
        (lambda: jnp.zeros(2**50, jnp.int8), "out of memory (RESOURCE_EXHAUSTED"),
        (raising(MemoryError()), "out of memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(failure, words, capsys, keep_interrupts):
    with pytest.raises(SystemExit) as ended:
        cli.call(failure)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


def test_a_mistake_of_the_program_keeps_its_traceback(keep_interrupts):
    with pytest.raises(ZeroDivisionError):
        cli.call(raising(ZeroDivisionError()))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="No space") as error, disk.replacing(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "x.json")
    with pytest.raises(OSError, match=r"too long") as error:
        disk.write_whole(tmp_path / ("x" * 300), b"")
    assert error.value.filename == str(tmp_path / ("x" * 300))


def test_an_evaluation_is_printed_before_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"step": 3, "val/loss": 1.5})
    monkeypatch.setattr(evaluate.host, "cache_compilations", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json"):
        evaluate.main(str(tmp_path / "nowhere"), "best", 0)
    assert "val/loss            1.5000" in capsys.readouterr().out


# Ctrl-C -----------------------------------------------------------------------------------------


@pytest.fixture
def keep_interrupts():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one_line(capsys, keep_interrupts):
    with pytest.raises(SystemExit) as ended:
        cli.call(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert ended.value.code == interrupts.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["python", "-m", "nrgpt_jax.sample", "--prompt=x"], True),
        (["python", "-mnrgpt_jax.train"], True),
        (["python", "-m", "pytest"], False),
    ],
)
def test_only_programs_of_this_package_end_at_once(words, program):
    """While they import: Python says `-m` where the name of the program will be."""
    code = (  # a shell's background jobs, such as these tests may be, ignore the signal
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; sys.argv, sys.orig_argv = ['-m'], {words!r}; import nrgpt_jax, os\n"
        "try: os.kill(os.getpid(), signal.SIGINT); print('goes on')\n"
        "except KeyboardInterrupt: print('as Python has it')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = (130, "", "interrupted\n") if program else (0, "as Python has it\n", "")
    assert (done.returncode, done.stdout, done.stderr) == expected
