"""The ``fedselect`` command: what it shows, its exit codes, and halves that are not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner
from wire_samples import GOLDEN, MASK, SPACE, THETA, put_together, take_apart, update

import fedselect
from fedselect import audit, cli, wire
from fedselect.errors import FedSelectError

RUNNER = CliRunner()
COMMAND = Path(sys.executable).with_name("fedselect")


def run(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """``main`` with these words; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["fedselect", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``main`` and give (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = run(*map(str, words), monkeypatch=monkeypatch)
        out, err = capsys.readouterr()
        return code, out, err

    return call


# --- wire inspect ------------------------------------------------------------------------------


def test_inspecting_an_update(tmp_path, command):
    path = tmp_path / "update.safetensors"
    path.write_bytes(update())
    code, out, err = command("wire", "inspect", path)
    assert (code, err) == (0, "")
    for text in ("fedselect-update/1", SPACE.digest[:20], "31.58 %", "6 of 19", "13 at bytes"):
        assert text in out


def test_inspecting_an_update_as_json(tmp_path, command):
    path = tmp_path / "update.safetensors"
    path.write_bytes(update())
    code, out, _ = command("wire", "inspect", path, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["format"] == wire.UPDATE_FORMAT
    assert facts["sha256"] == wire.file_digest(update())
    assert facts["size"] == len(update())
    assert facts["metadata"]["examples"] == "120"
    assert facts["sections"]["values"]["count"] == MASK.shared
    assert (facts["elements"], facts["personal"]) == (19, 6)
    assert facts["personal_share"] == pytest.approx(6 / 19)


def test_an_update_without_its_mask_has_an_unknown_share(tmp_path, command):
    path = tmp_path / "update.safetensors"
    path.write_bytes(update(send_mask=False))
    assert "has not changed" in command("wire", "inspect", path)[1]
    facts = json.loads(command("wire", "inspect", path, "--json")[1])
    assert (facts["elements"], facts["personal_share"], facts["shared"]) == (None, None, 13)


def test_inspecting_a_version(tmp_path, command):
    path = tmp_path / "version.safetensors"
    path.write_bytes(wire.encode_version(SPACE.digest, THETA))
    facts = json.loads(command("wire", "inspect", path, "--json")[1])
    assert (facts["format"], facts["elements"]) == (wire.VERSION_FORMAT, 19)
    assert "personal" not in command("wire", "inspect", path)[1]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_every_golden_file_is_valid(path, command):
    code, out, _ = command("wire", "inspect", path, "--json")
    assert code == 0
    expected = json.loads(path.with_suffix(".json").read_text())
    assert json.loads(out)["sha256"] == expected["sha256"]
    assert json.loads(out)["elements"] in {expected["elements"], None}


def with_payload(change) -> bytes:
    header, payload = take_apart(update())
    return put_together(header, change(payload))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "file_truncated"),
        (b"# a text, no safetensors file\n", "header_oversize"),
        (b"\x02" + bytes(7) + b"[]", "header_invalid"),
        (update()[:-1], "file_truncated"),
        (update() + b"\0", "file_trailing"),
        (safetensors.numpy.save({"w": np.zeros(3)}), "header_invalid"),
        (update().replace(b"update/1", b"update/3"), "format_unknown"),
        (with_payload(lambda p: p[:16] + b"\0\0\xc0\x7f" + p[20:]), "values_not_finite"),
        (with_payload(lambda p: b"\1" + p[1:]), "block_rank_invalid"),
        (with_payload(lambda p: p[:-1] + b"\x82"), "mask_padding"),
        (with_payload(lambda p: p[:-3] + bytes(3)), "mask_size"),
        (put_together(*take_apart(update(send_mask=False)))[:-1], "file_truncated"),
    ],
)
def test_a_bad_file_is_one_line_with_its_code(data, code, tmp_path, command):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    for words in (["wire", "inspect", path], ["wire", "inspect", path, "--json"]):
        exit_code, out, err = command(*words)
        assert (exit_code, out) == (1, "")
        assert err.startswith(f"error[{code}]: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("ranks", [b"", bytes(8), bytes(15) + b"\1"])
def test_a_bad_rank_without_a_mask(ranks, tmp_path, command):
    header, payload = take_apart(update(send_mask=False))
    count = len(ranks) // 8
    header["block_rank"] |= {"shape": [count], "data_offsets": [0, 8 * count]}
    header["values"]["data_offsets"] = [8 * count, 8 * count + 52]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(put_together(header, ranks + payload[16:]))
    assert "block_rank_invalid" in command("wire", "inspect", path)[2]


def test_what_is_no_file_of_ours_is_not_read_to_its_end(tmp_path, command):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros; hashing it would take an hour
    assert "header_invalid" in command("wire", "inspect", path)[2]


def test_a_file_cannot_steer_the_terminal(tmp_path, command):
    path = tmp_path / "update.safetensors"
    path.write_bytes(update(run="\x1b[2J\r[red]red[/red]"))
    code, out, _ = command("wire", "inspect", path)
    assert code == 0
    assert "\x1b[2J" not in out
    assert "[red]" in out
    path.write_bytes(update().replace(b"fedselect-update/1", b"\\u001b[2J\\nx/1  "))
    _, _, err = command("wire", "inspect", path)
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize("words", [["wire", "inspect"], ["audit", "verify"]])
def test_a_file_that_is_not_there_is_a_usage_error(words, tmp_path, command):
    assert command(*words, tmp_path / "nothing")[0] == 2
    assert command(*words, tmp_path)[0] == 2
    assert command(*words)[0] == 2


# --- audit verify ------------------------------------------------------------------------------

ORIGIN = "fedselect.example/ledger"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = audit.verifier_key(KEY.public_key(), ORIGIN)


def export(count: int = 9) -> list[str]:
    entries = [
        {"seq": seq, "action": "run.started", "body": {"größe": seq}} for seq in range(count)
    ]
    leaves = [audit.entry_leaf(entry) for entry in entries]
    body = audit.checkpoint_body(ORIGIN, count, audit.tree_root(leaves))
    documents: list[dict] = [
        {"seq": e["seq"], "leaf": leaf.hex(), "entry": e}
        for e, leaf in zip(entries, leaves, strict=True)
    ]
    signed = audit.sign_checkpoint(body, KEY, ORIGIN)
    documents.append({"checkpoint": signed, "public_key": PUBLIC})
    return [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(export()), encoding="utf-8")
    return path


def test_verifying_an_export(ledger, command):
    head = ledger.with_name("checkpoint.txt")
    head.write_text(json.loads(ledger.read_text().splitlines()[-1])["checkpoint"])
    words = ["audit", "verify", ledger, "--public-key", PUBLIC, "--checkpoint", head]
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    assert "9 entries" in out
    assert "note:" not in out
    assert command("audit", "verify", ledger)[1].count("note:") == 2


def test_verifying_an_export_as_json(ledger, command):
    code, out, _ = command("audit", "verify", ledger, "--json", "--public-key", f" {PUBLIC}\n")
    assert code == 0
    report = json.loads(out)
    assert (report["valid"], report["entries"], report["pinned"]) == (True, 9, True)
    assert (report["origin"], report["public_key"]) == (ORIGIN, PUBLIC)
    assert not json.loads(command("audit", "verify", ledger, "--json")[1])["pinned"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data.replace(b"run.started", b"run.stopped", 1), "entry 0:"),
        (lambda data: data.replace("größe".encode(), "größe".encode("latin-1"), 1), "entry 0:"),
        (lambda data: b"".join(data.splitlines(keepends=True)[:-1]), "entry 9:"),
        (lambda data: b"".join(data.splitlines(keepends=True)[1:]), "entry 0:"),
        (lambda data: data[:-1].replace(b"\n", b"\r"), "entry 0:"),
        (lambda data: b"", "entry 0:"),
        (lambda data: b"\xff\xfe\x00", "entry 0:"),
    ],
)
def test_a_changed_export_is_one_line_that_names_the_entry(change, text, ledger, command):
    ledger.write_bytes(change(ledger.read_bytes()))
    code, out, err = command("audit", "verify", ledger)
    assert (code, out) == (1, "")
    assert err.startswith("error[ledger_invalid]: ")
    assert text in err
    assert err.count("\n") == 1


def test_another_key_than_the_pinned_one(ledger, command):
    other = audit.verifier_key(Ed25519PrivateKey.generate().public_key(), ORIGIN)
    for key in (other, "nonsense", ""):
        code, _, err = command("audit", "verify", ledger, "--public-key", key)
        assert code == 1
        assert err.startswith("error[ledger_invalid]")


# --- dispatch ----------------------------------------------------------------------------------


def test_the_version(command):
    assert command("--version") == (0, f"fedselect {fedselect.__version__}\n", "")


def test_help_of_the_light_commands():
    app = cli.build("wire")
    for words, texts in (
        (["--help"], ["wire", "audit", "--version"]),
        (["wire", "--help"], ["inspect"]),
        (["wire", "inspect", "-h"], ["--json"]),
        (["audit", "verify", "--help"], ["--public-key", "--json"]),
    ):
        result = RUNNER.invoke(app, words)
        assert result.exit_code == 0
        for text in texts:
            assert text in result.stdout


def test_unknown_commands_are_usage_errors(monkeypatch, command):
    halves(monkeypatch)
    code, out, err = command("nonsense")
    assert (code, out) == (2, "")
    assert "No such command" in err


def halves(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Install exactly these entry points."""
    points = [EntryPoint(name, value, cli.GROUP) for name, value in values.items()]
    monkeypatch.setattr(cli, "entry_points", lambda *, group: points)


def register_hello(app: typer.Typer) -> None:
    """Stands for another half in the tests below."""

    @app.command()
    def hello() -> None:
        """Say hello."""
        typer.echo("hello")

    @app.command()
    def refuse() -> None:
        raise FedSelectError("no\nway", code="refused")

    @app.command()
    def up() -> None:
        import missing_library  # noqa: F401

    @app.command()
    def down() -> None:
        import fedselect.missing_module  # noqa: F401


HERE = f"{__name__}:register_hello"


def test_a_registered_half_is_loaded(monkeypatch, command):
    halves(monkeypatch, other=HERE)
    assert command("hello") == (0, "hello\n", "")
    assert command("refuse") == (1, "", "error[refused]: no way\n")
    assert "Say hello." in command("--help")[1]


def test_light_commands_load_no_half(monkeypatch, tmp_path, command):
    halves(monkeypatch, other="missing_package:register")
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("a half was loaded"))
    path = tmp_path / "update.safetensors"
    path.write_bytes(update())
    assert command("wire", "inspect", path)[0] == 0
    assert command("--version")[0] == 0


def test_a_known_command_loads_its_own_half_only(monkeypatch):
    halves(monkeypatch, server=HERE, learning="missing_package:register")
    loaded = []
    monkeypatch.setattr(cli, "_load", lambda app, point: loaded.append(point.name))
    for word, names in (("up", ["server"]), ("simulate", ["learning"]), (None, [])):
        loaded.clear()
        cli.build(word)
        assert loaded == (names or ["learning", "server"])


def test_a_half_that_is_not_installed_leaves_a_hint(monkeypatch, command):
    halves(monkeypatch, server="missing_package.cli:register", other=HERE)
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = command("--help")
    assert code == 0
    assert "pip install 'fedselect[server]'" in out
    for text in ("Say hello.", *cli.HALVES["server"].commands):
        assert text in out
    for words in (["up"], ["up", "--port", "1"], ["up", "--help"], ["gc", "key"]):
        code, out, err = command(*words)
        assert (code, out) == (1, "")
        assert err.startswith("error[extra_missing]: ")
        assert "pip install 'fedselect[server]'" in err
    assert command("hello")[0] == 0


def test_an_unknown_half_that_is_not_installed_does_not_break_the_rest(monkeypatch, command):
    halves(monkeypatch, extra="missing_package:register", other=HERE)
    assert command("hello")[0] == 0
    code, _, err = command("extra")
    assert code == 1
    assert "missing_package" in err


def test_a_library_missing_when_a_command_runs_is_a_hint_too(monkeypatch, command):
    halves(monkeypatch, server=HERE)
    code, _, err = command("up")
    assert code == 1
    assert err.startswith("error[extra_missing]: 'up' cannot be loaded")
    monkeypatch.setattr(sys, "argv", ["fedselect", "down"])
    with pytest.raises(ModuleNotFoundError, match="missing_module"):
        cli.main()


@pytest.mark.parametrize("half", cli.HALVES)
def test_the_hints_name_the_real_commands(half):
    points = {point.name: point for point in cli.entry_points(group=cli.GROUP)}
    if half not in points:
        pytest.skip(f"the half {half} is not registered here")
    try:
        register = points[half].load()
    except ImportError as error:
        pytest.skip(f"the half {half} cannot be loaded here: {error}")
    app = typer.Typer()
    register(app)
    registered = {info.name or info.callback.__name__ for info in app.registered_commands}
    registered |= {info.name for info in app.registered_groups}
    assert registered <= set(cli.HALVES[half].commands)


def test_the_real_command(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not a safetensors file")
    result = subprocess.run(
        [COMMAND, "wire", "inspect", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error[header_oversize]: ")
    assert "Traceback" not in result.stderr


def test_help_of_the_agent_shows_how_a_task_is_named(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("agent", "--help")
    words = "".join(c for c in out if c.isalnum() or c in ".:/=")
    assert code == 0
    for shown in ("package.module:Name", "path/to/file.py:Name", "https://host:port"):
        assert shown in words
