"""Weights on a hub: a server on this machine with the hub's addresses, and ``huggingface_hub``."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import hyperadam
from conftest import make_weights
from hyperadam import load_weights, save_weights
from hyperadam.baselines import make_baseline, make_baselines
from hyperadam.cli import run
from hyperadam.errors import ConfigError, MissingDependencyError, WeightsError
from hyperadam.rule import RULES
from hyperadam.weights import HubAddress, push_weights
from hyperadam.weights.publish import model_card
from weights.hub_server import READER, WRITER, HubServer, Repo

pytest.importorskip("huggingface_hub")
# huggingface_hub's own: how it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO = "meta/digits"
ADDRESS = f"hf://{REPO}"


def content_of(weights, folder):
    path = folder / "w.safetensors"
    save_weights(weights, path)
    return path.read_bytes()


def _library_modules():
    return [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]


@pytest.fixture
def use_library(monkeypatch, tmp_path):
    """``huggingface_hub`` as a new process has it, with an environment of its own.

    It reads its environment when it is imported; what other tests have imported comes back after.
    """
    kept = {name: sys.modules[name] for name in _library_modules()}

    def forget():
        library = sys.modules.get("huggingface_hub")
        if library is not None and library is not kept.get("huggingface_hub"):
            library.close_session()
        for name in _library_modules():
            del sys.modules[name]

    def use(endpoint, *, offline=False, token=None, cache="cache"):
        forget()
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / cache),
            "HF_HUB_OFFLINE": "1" if offline else None,
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        for name, value in environment.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    yield use
    forget()
    sys.modules.update(kept)


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def first(server, use_library, weights, tmp_path):
    """The first commit of a repository, of ``weights``, which is what ``main`` and ``v1`` are."""
    repo = server.repos[REPO] = Repo()
    commit = repo.commit({"weights.safetensors": content_of(weights, tmp_path)})
    repo.refs["v1"] = commit
    use_library(server.endpoint)
    return commit


@pytest.fixture
def second(server, first, tmp_path):
    """The next commit of ``main``: other weights, and more files."""
    content = content_of(make_weights(seed=1), tmp_path)
    broken = content[:-1] + bytes([content[-1] ^ 1])
    return server.repos[REPO].commit(
        {
            "weights.safetensors": content,
            "all/of them/small.safetensors": content,
            "flipped.safetensors": broken,
            "cut.safetensors": content[: len(content) // 2],
            "foreign.safetensors": safetensors.torch.save({"a": torch.zeros(2)}),
            "notes.txt": b"no weights",
        }
    )


def load_told(address):
    """Weights of an address that can change, and what is said about it."""
    with pytest.warns(UserWarning, match="can change") as told:
        weights = load_weights(address)
    assert len(told) == 1
    return weights, str(told[0].message)


@pytest.mark.parametrize(
    ("text", "address", "short"),
    [
        ("hf://a/b", HubAddress("a/b"), "a/b"),
        ("hf://a/b@main", HubAddress("a/b"), "a/b"),
        ("hf://a-1/b.c_d@v1.0", HubAddress("a-1/b.c_d", "v1.0"), "a-1/b.c_d@v1.0"),
        ("hf://a/b/c/d.safetensors", HubAddress("a/b", file="c/d.safetensors"), "a/b/c/d"),
        (
            f"hf://a/b@{'0123456789' * 4}/d.safetensors",
            HubAddress("a/b", "0123456789" * 4, "d.safetensors"),
            "a/b@01234567/d",
        ),
        ("hf://a/b@refs/pr/12", HubAddress("a/b", "refs/pr/12"), "a/b@refs/pr/12"),
        (
            "hf://a/b@refs/pr/12/d.safetensors",
            HubAddress("a/b", "refs/pr/12", "d.safetensors"),
            "a/b@refs/pr/12/d",
        ),
    ],
)
def test_addresses(text, address, short):
    assert HubAddress.parse(text) == address
    assert HubAddress.parse(str(address)) == address
    assert address.short() == short
    assert address.pinned == ("0123456789" * 4 in text)


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://a",
        "hf:///b",
        "hf://a/b@",
        "hf://a/b/",
        "hf://a/b/w.bin",
        "hf://a/b/w.pt@main",
        "hf://a/b/w.safetensors@main",
        "hf://a/b/../../w.safetensors",
        "hf://a/b//w.safetensors",
        "hf://a/b?x=1",
        "hf://a/ü",
        "hf://a/b@main@main",
        "hf://a/b\n",
        "hf://datasets/a/b",
    ],
)
def test_what_is_no_address(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # told before it is asked for
    with pytest.raises(WeightsError, match="of the form hf://org/name"):
        load_weights(text)


def test_a_branch_moves_and_a_commit_does_not(server, first, weights, tmp_path):
    loaded, told = load_told(ADDRESS)
    assert loaded.digest() == weights.digest()
    assert told == (
        f"{ADDRESS} can change: its main is commit {first} now. To keep these weights: "
        f"{ADDRESS}@{first}"
    )
    later = make_weights(seed=1)
    second = server.repos[REPO].commit({"weights.safetensors": content_of(later, tmp_path)})
    loaded, told = load_told(ADDRESS)
    assert loaded.digest() == later.digest() != weights.digest()
    assert second in told
    assert load_weights(f"{ADDRESS}@{first}").digest() == weights.digest()
    loaded, told = load_told(f"{ADDRESS}@v1")
    assert loaded.digest() == weights.digest()
    assert f"its v1 is commit {first} now" in told


def test_what_is_told_is_told_once(first):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            load_weights(ADDRESS)
    assert len(told) == 1


def test_a_pinned_file_in_the_cache_asks_nobody(server, first, use_library, weights):
    pinned = f"{ADDRESS}@{first}"
    assert load_weights(pinned).digest() == weights.digest()
    assert f"HEAD /{REPO}/resolve/{first}/weights.safetensors" in server.requests
    server.requests.clear()
    use_library(server.endpoint)
    assert load_weights(pinned).digest() == weights.digest()
    assert server.requests == []
    server.stop()
    assert load_weights(pinned).digest() == weights.digest()


def test_a_file_within(second):
    pinned = f"hf://{REPO}@{second}/all/of them/small.safetensors"
    assert load_weights(pinned).digest() == make_weights(seed=1).digest()
    _, told = load_told(f"hf://{REPO}/all/of them/small.safetensors")
    assert told.endswith(pinned)


def test_a_pull_request(server, first, tmp_path):
    proposed = make_weights(seed=2)
    server.repos[REPO].commit(
        {"weights.safetensors": content_of(proposed, tmp_path)}, to="refs/pr/3"
    )
    loaded, _ = load_told(f"{ADDRESS}@refs/pr/3")
    assert loaded.digest() == proposed.digest()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://meta/digist", "has no repository meta/digist, or does not show it: .*hf auth login"),
        ("hf://meta/-x", "meta/-x: Repo id must"),
        (f"{ADDRESS}@v2", "meta/digits has no branch, tag or commit v2"),
        (f"{ADDRESS}@{'0' * 40}", "meta/digits has no branch, tag or commit 0000"),
        (f"{ADDRESS}/none.safetensors", "meta/digits has no file none.safetensors at main"),
        (f"{ADDRESS}@v1/all.safetensors", "meta/digits has no file all.safetensors at v1"),
    ],
)
def test_what_is_not_there(second, address, message):
    with pytest.raises(WeightsError, match=message):
        load_weights(address)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut", "not a readable safetensors file"),
        ("flipped", "is damaged: its content does not match the digest"),
        ("foreign", "not a hyperadam-weights file"),
    ],
)
def test_content_that_is_no_weights(second, name, message):
    with pytest.raises(WeightsError, match=rf"meta--digits.*{second}.*{name}.*{message}"):
        load_weights(f"{ADDRESS}@{second}/{name}.safetensors")


def test_private_and_gated(server, first, use_library, weights):
    repo = server.repos[REPO]
    repo.private = True
    with pytest.raises(WeightsError, match=r"no repository.*private or gated.*HF_TOKEN"):
        load_weights(ADDRESS)
    use_library(server.endpoint, token=READER)
    assert load_weights(f"{ADDRESS}@{first}").digest() == weights.digest()
    repo.gated = True
    use_library(server.endpoint, token=READER, cache="new")
    with pytest.raises(WeightsError, match="private or gated"):
        load_weights(ADDRESS)


def test_offline_by_choice(server, first, use_library, weights):
    load_told(ADDRESS)
    server.repos[REPO].refs["main"] = "1" * 40
    server.requests.clear()
    use_library(server.endpoint, offline=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_weights(f"{ADDRESS}@{first}").digest() == weights.digest()
    loaded, told = load_told(ADDRESS)
    assert loaded.digest() == weights.digest()
    assert f"the hub can't be asked, the cache has commit {first}" in told
    assert "HF_HUB_OFFLINE" in told
    for missing in (f"{ADDRESS}@v1", f"{ADDRESS}@{'1' * 40}", "hf://meta/other"):
        with pytest.raises(WeightsError, match=r"not in the cache \(.*cache.*HF_HUB_OFFLINE"):
            load_weights(missing)
    assert server.requests == []


@pytest.mark.parametrize("how", ["gone", "503"])
def test_no_network(server, first, use_library, weights, how):
    load_told(ADDRESS)
    if how == "gone":
        server.stop()
    server.down = True
    loaded, told = load_told(ADDRESS)
    assert loaded.digest() == weights.digest()
    assert f"the hub can't be asked, the cache has commit {first}" in told
    assert ("refused" if how == "gone" else "503") in told
    started = time.perf_counter()
    for missing in (f"{ADDRESS}@v1", f"{ADDRESS}@{'1' * 40}"):
        with pytest.raises(WeightsError, match=rf"{missing} is not in the cache.*can't be asked"):
            load_weights(missing)
    assert time.perf_counter() - started < 5


def test_without_the_library(monkeypatch, tmp_path, weights):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    save_weights(weights, tmp_path / "w.safetensors")
    for use in (
        lambda: load_weights(ADDRESS),
        lambda: push_weights(tmp_path / "w.safetensors", REPO),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install '\.\[hub\]'"):
            use()


def test_the_optimizer_takes_an_address(first, weights):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = hyperadam.VariationalHyperAdam([param], weights=f"{ADDRESS}@{first}")
    assert optimizer.param_groups[0]["lr"] == weights.lr
    param.square().sum().backward()
    optimizer.step()
    assert not torch.equal(param.detach(), torch.ones(3))


def test_show_in_a_process_of_its_own(first, weights):
    """Standard output has the weights, standard error which commit it is."""
    command = [sys.executable, "-m", "hyperadam", "weights", "show", ADDRESS]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert weights.digest() in result.stdout
    assert result.stderr.count(f"{ADDRESS}@{first}") == 1


def test_names_in_an_evaluation(server, first, tmp_path):
    with pytest.warns(UserWarning, match="can change"):
        baseline = make_baseline(f"variational-hyperadam@{ADDRESS}")
    assert baseline.name == f"variational-hyperadam@{REPO}"
    assert baseline.text == f"variational-hyperadam@{ADDRESS}@{first}"
    again = make_baseline(baseline.text)
    assert again.name == f"variational-hyperadam@{REPO}@{first[:8]}"
    assert again.weights == baseline.weights
    with pytest.raises(ConfigError, match="adam takes no weights"):
        make_baseline(f"adam@{ADDRESS}")
    server.repos[REPO].commit({"weights.safetensors": content_of(make_weights(seed=1), tmp_path)})
    with pytest.warns(UserWarning, match="can change"):
        both = make_baselines([baseline.text, f"variational-hyperadam@{ADDRESS}"])
    assert len({one.weights for one in both}) == 2


def test_evaluation_keeps_to_one_commit(capsys, server, first, weights, tmp_path):
    """The workers are given the commit, and take it from the cache."""
    arguments = [
        *("evaluate", "--suite", "digits", "--tasks", "digits-mlp1-relu", "--steps", "3"),
        *("--seeds", "2", "--optimizers", f"variational-hyperadam@{ADDRESS}"),
        *("--out", str(tmp_path / "out")),
    ]
    with pytest.warns(UserWarning, match=first):
        assert run(arguments) == 0
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert len(runs) == 2
    assert {run["optimizer"] for run in runs} == {f"variational-hyperadam@{REPO}"}
    assert {run["weights"] for run in runs} == {weights.digest()}
    assert [line.split()[0] for line in server.requests] == ["GET", "HEAD", "GET"]
    assert "can change" not in capsys.readouterr().err
    assert run(["report", str(tmp_path / "out")]) == 0
    assert REPO in (tmp_path / "out" / "report.md").read_text()


@pytest.fixture
def file(tmp_path, weights):
    path = tmp_path / "mine.safetensors"
    save_weights(dataclasses.replace(weights, licence="Apache-2.0", steps=1234), path)
    return path


def test_push_then_load(capsys, server, use_library, file):
    use_library(server.endpoint, token=WRITER)
    assert run(["weights", "push", str(file), "me/mine"]) == 0
    repo = server.repos["me/mine"]
    commit = repo.refs["main"]
    address = f"hf://me/mine@{commit}"
    assert capsys.readouterr().out == f"to use these weights: {address}\n"
    assert repo.commits[commit]["weights.safetensors"] == file.read_bytes()
    assert not repo.private
    digest = load_weights(file).digest()
    assert digest[:12] in repo.messages[-1]
    assert load_weights(address).digest() == digest

    save_weights(make_weights(seed=3), file)
    later = push_weights(file, "me/mine")
    assert later == f"hf://me/mine@{repo.refs['main']}" != address
    assert load_weights(later).digest() == make_weights(seed=3).digest()
    assert load_weights(address).digest() == digest


def test_the_page_of_what_was_pushed(server, use_library, file):
    use_library(server.endpoint, token=WRITER)
    push_weights(file, "me/mine", private=True)
    repo = server.repos["me/mine"]
    assert repo.private
    page = repo.commits[repo.refs["main"]]["README.md"].decode()
    assert page == model_card(load_weights(file), "me/mine")
    _, front, text = page.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    for shown in (load_weights(file).digest(), "1,234", "Apache-2.0", "variational-hyperadam"):
        assert f" {shown}" in text
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"model": torch.nn.Linear(2, 1)}
    with pytest.warns(UserWarning, match="can change"):
        exec(example, names)
    assert isinstance(names["optimizer"], hyperadam.VariationalHyperAdam)
    push_weights(file, "me/mine", private=True)


@pytest.mark.parametrize("rule_name", sorted(RULES), indirect=True)
def test_a_page_of_each_rule(rule_name):
    weights = make_weights(RULES[rule_name](channels=3))
    page = model_card(weights, "me/mine")
    line = re.search(r"^from .*$", page, re.MULTILINE)[0]
    names = {}
    exec(line, names)
    (optimizer,) = (value for name, value in names.items() if name != "__builtins__")
    assert optimizer.rule_name == weights.rule.name == rule_name
    assert f"{rule_name}@hf://me/mine" in page


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        ("MIT", {"license": "mit"}),
        ("unknown", {"license": "unknown"}),
        ("Mine: no\nwar", {"license": "other", "license_name": "Mine: no\nwar"}),
    ],
)
def test_a_page_of_odd_words(weights, licence, metadata):
    """They change neither the metadata nor the table."""
    odd = dataclasses.replace(weights, licence=licence, data="a|b\n---\n# c <b>", preset="`x` *y*")
    _, front, text = model_card(odd, "me/mine").split("---\n", 2)
    values = yaml.safe_load(front)
    assert {name: values[name] for name in values if name.startswith("license")} == metadata
    assert r"| meta-trained on | a\|b --- # c \<b\> |" in text
    assert r"| recipe | \`x\` \*y\* |" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-20], "not a readable safetensors file"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
        (lambda _: safetensors.torch.save({"a": torch.zeros(2)}), "not a hyperadam-weights file"),
    ],
)
def test_only_weights_are_pushed(server, use_library, file, change, message):
    use_library(server.endpoint, token=WRITER)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(WeightsError, match=message):
        push_weights(file, "me/mine")
    assert server.requests == []


def test_pushes_that_are_refused(capsys, server, use_library, file):
    def refused(repo="me/mine", *options):
        assert run(["weights", "push", str(file), repo, *options]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    use_library(server.endpoint, token=WRITER)
    for name in ("mine", "me/mine@main", "me/mine/w.safetensors"):
        assert "of the form" in refused(name)
    assert "Repo id must" in refused("me/-mine")
    server.repos["me/mine"] = Repo()
    server.repos["me/mine"].commit({})
    assert "me/mine is there and public" in refused("me/mine", "--private")
    assert len(server.repos["me/mine"].commits) == 1
    for token in (None, READER):
        use_library(server.endpoint, token=token)
        for name in ("me/mine", "me/other"):
            assert "a token that may write" in refused(name)
    server.full = True
    use_library(server.endpoint, token=WRITER)
    assert "507" in refused()
    use_library(server.endpoint, token=WRITER, offline=True)
    assert "HF_HUB_OFFLINE" in refused()
    server.stop()
    use_library(server.endpoint, token=WRITER)
    assert "refused" in refused()
    assert len(server.repos["me/mine"].commits) == 1


def test_the_example_of_the_page(server, use_library, weights, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    repo = server.repos["org/name"] = Repo()
    repo.refs["v1"] = repo.commit({"weights.safetensors": content_of(weights, tmp_path)})
    use_library(server.endpoint)
    names = {"model": torch.nn.Linear(2, 1)}
    with pytest.warns(UserWarning, match="can change") as told:
        exec(example, names)
    assert len(told) == 2
    assert names["weights"].digest() == weights.digest()
