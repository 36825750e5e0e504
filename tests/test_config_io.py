"""Config files, overrides and their errors, on a schema of this test's own."""

import textwrap
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracerl_jax import config_io
from tracerl_jax.config_io import describe, from_dict, load_config, to_dict
from tracerl_jax.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    rate: float = field(default=1e-3, metadata={"doc": "peak learning rate"})
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError(f"rate is {self.rate}, must not be negative")


@dataclass(frozen=True)
class Loss:
    kind: Literal["tokens", "sequences"] = "tokens"
    clip: float | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"math": 1.0})
    optimizer: Optimizer = Optimizer(rate=0.5)  # another default than the class has


@dataclass(frozen=True)
class Run:
    name: str = "run"
    path: str | None = None
    steps: int = 10
    every: int = 5
    resume: bool = True
    sizes: tuple[int, ...] = (1, 2)
    tags: tuple[str, ...] = ()
    grid: tuple[tuple[int, int], ...] = ()
    loss: Loss = field(default=Loss(), metadata={"doc": "what is minimised"})
    extra: Optimizer | None = None

    def __post_init__(self):
        if self.every > self.steps:
            raise ConfigError(f"every={self.every} is more than steps={self.steps}")


@dataclass(frozen=True)
class Needy:
    path: str
    loss: Loss = Loss()


@pytest.fixture
def write(tmp_path):
    """Writes a config file whose get_config has the given body."""

    def write(body: str, signature: str = "arg=None"):
        file = tmp_path / "example.py"
        body = textwrap.indent(textwrap.dedent(body), "    ")
        file.write_text(
            f"from ml_collections import ConfigDict\n\n\ndef get_config({signature}):\n    c = ConfigDict()\n{body}\n"
            "    return c\n"
        )
        return str(file)

    return write


def message(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def test_file_sets_a_subset(write):
    run = load_config(Run, write("c.steps = 20\nc.loss = dict(clip=1, optimizer=dict(warmup=3))"))
    assert run == Run(steps=20, loss=Loss(clip=1.0, optimizer=Optimizer(rate=0.5, warmup=3)))
    assert isinstance(run.loss.clip, float)


def test_a_group_keeps_the_defaults_its_owner_gave_it(write):
    run = load_config(Run, write("pass"), ["loss.optimizer.warmup=7"])
    assert run.loss.optimizer == Optimizer(rate=0.5, warmup=7)


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("path=none", "path", None),
        ("path=/a/b", "path", "/a/b"),
        ("steps=1_000", "steps", 1000),
        ("resume=False", "resume", False),
        ("resume=1", "resume", True),
        ("sizes=(3,4,5)", "sizes", (3, 4, 5)),
        ("sizes=3, 4", "sizes", (3, 4)),
        ("sizes=7", "sizes", (7,)),
        ("sizes=(7,)", "sizes", (7,)),
        ("sizes=()", "sizes", ()),
        ("sizes=", "sizes", ()),
        ("tags=a,b c", "tags", ("a", "b c")),
        ("tags=('a','b')", "tags", ("a", "b")),
        ("grid=((1,2),(3,4))", "grid", ((1, 2), (3, 4))),
        ("loss.kind=sequences", "loss.kind", "sequences"),
        ("loss.clip=2", "loss.clip", 2.0),
        ("loss.clip=none", "loss.clip", None),
        ("loss.optimizer.rate=1e-5", "loss.optimizer.rate", 1e-5),
        ("loss.optimizer.betas=0.8,0.9", "loss.optimizer.betas", (0.8, 0.9)),
        ("loss.weights.format=0.5", "loss.weights", {"math": 1.0, "format": 0.5}),
        ("loss.weights={'format': 2}", "loss.weights", {"format": 2.0}),
        ("extra.warmup=2", "extra", Optimizer(warmup=2)),
        ("--config.every=3", "every", 3),
    ],
)
def test_overrides(write, override, key, value):
    result = load_config(Run, write("pass"), [override])
    for name in key.split("."):
        result = getattr(result, name)
    assert result == value
    assert type(result) is type(value)


def test_later_overrides_win_and_beat_the_file(write):
    file = write("c.steps = 20\nc.extra = dict(warmup=4)\nc.loss = dict(weights=dict(a=1.0))")
    run = load_config(Run, file, ["steps=30", "steps=40", "extra=none", "loss.weights.b=2"])
    assert (run.steps, run.extra, run.loss.weights) == (40, None, {"a": 1.0, "b": 2.0})


def test_derived_values_follow_overrides(write):
    file = write("c.steps = 10\nc.every = c.get_ref('steps') // 5")
    assert load_config(Run, file).every == 2
    assert load_config(Run, file, ["steps=100"]).every == 20
    assert load_config(Run, file, ["steps=100", "every=7"]).every == 7


def test_argument_after_a_colon(write):
    file = write("c.steps = int(arg or 10)")
    assert load_config(Run, f"{file}:50").steps == 50
    assert load_config(Run, file).steps == 10
    assert "takes no argument" in message(load_config, Run, write("pass", signature="") + ":50")


def test_installed_config_by_name(write, monkeypatch, tmp_path):
    write("c.steps = 20")
    monkeypatch.setattr(config_io, "installed_configs", lambda: {"example": tmp_path / "example.py"})
    assert load_config(Run, "example").steps == 20
    assert load_config(Run, "example.py:arg").steps == 20
    text = message(load_config, Run, "exmple")
    assert "did you mean example?" in text and "exmple" in text


def test_installed_configs_are_those_of_the_package():
    for name, file in config_io.installed_configs().items():
        assert file.is_file() and file.stem == name and file.parent.name == "configs"


@pytest.mark.parametrize(
    "override, parts",
    [
        ("stepz=3", ["--config.stepz", "unknown key", "did you mean --config.steps?"]),
        ("rate=3", ["--config.rate", "--config.loss.optimizer.rate", "--config.extra.rate"]),
        ("loss.optimiser.rate=3", ["did you mean --config.loss.optimizer.rate"]),
        ("steps.x=3", ["--config.steps.x", "unknown key"]),
        ("steps", ["--config.steps=VALUE"]),
        ("steps=many", ["--config.steps", "expected int", "'many'"]),
        ("steps=1.5", ["--config.steps", "expected int", "'1.5'"]),
        ("resume=maybe", ["expected bool", "'maybe'"]),
        ("sizes=1,x", ["--config.sizes", "expected (int, ...)"]),
        ("loss.kind=rows", ["--config.loss.kind", "tokens, sequences", "'rows'"]),
        ("loss.optimizer.betas=1,2,3", ["--config.loss.optimizer.betas", "(float, float)"]),
        ("loss.weights={'a': 'x'}", ["--config.loss.weights.a", "expected float", "'x'"]),
        ("loss.weights.a=x", ["--config.loss.weights.a", "expected float", "'x'"]),
        ("loss=3", ["--config.loss:", "one of its keys", "kind, clip"]),
        ("loss.optimizer.rate=-1", ["example.py with --config.loss.optimizer.rate", "loss.optimizer: rate is -1.0"]),
        ("every=50", ["example.py with --config.every", "every=50 is more than steps=10"]),
    ],
)
def test_bad_overrides(write, override, parts):
    text = message(load_config, Run, write("pass"), [override])
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "body, parts",
    [
        ("c.stepz = 3", ["example.py", "unknown key stepz", "did you mean steps?"]),
        ("c.loss = dict(cilp=3)", ["example.py", "unknown key loss.cilp", "did you mean loss.clip?"]),
        ("c.steps = '3'", ["example.py: steps", "expected int", "'3' (str)"]),
        ("c.steps = 3.0", ["example.py: steps", "expected int", "3.0 (float)"]),
        ("c.steps = True", ["example.py: steps", "expected int", "True (bool)"]),
        ("c.steps = None", ["example.py: steps", "expected int", "None"]),
        ("c.resume = 1", ["example.py: resume", "expected bool"]),
        ("c.loss = dict(clip='x')", ["example.py: loss.clip", "expected float or none", "'x' (str)"]),
        ("c.loss = dict(clip=True)", ["example.py: loss.clip", "expected float or none"]),
        ("c.sizes = (1, 'x')", ["example.py: sizes[1]", "expected int"]),
        ("c.sizes = 3", ["example.py: sizes", "expected (int, ...)"]),
        ("c.loss = dict(kind='rows')", ["example.py: loss.kind", "tokens, sequences"]),
        ("c.loss = 3", ["example.py: loss", "expected a group", "kind"]),
        ("c.loss = dict(optimizer=dict(rate=-1.0))", ["example.py: loss.optimizer: rate is -1.0"]),
        ("c.steps = c.stepz", ["example.py, line 6", "stepz"]),
    ],
)
def test_bad_files(write, body, parts):
    text = message(load_config, Run, write(body))
    for part in parts:
        assert part in text


def test_override_below_something_that_is_no_group(write):
    text = message(load_config, Run, write("c.loss = 3"), ["loss.clip=1"])
    assert "example.py: loss: expected a group" in text


@pytest.mark.parametrize(
    "content, part",
    [
        ("x = (", "line 1: SyntaxError"),
        ("import no_such_module", "line 1: ModuleNotFoundError"),
        ("x = 1", "get_config"),
        ("def get_config(arg=None):\n    return {}", "ConfigDict, not dict"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, part):
    file = tmp_path / "broken.py"
    file.write_text(content)
    text = message(load_config, Run, str(file))
    assert str(file) in text and part in text


def test_missing_file_lists_the_installed_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(config_io, "installed_configs", lambda: {"demo": tmp_path / "demo.py"})
    text = message(load_config, Run, "nowhere/quick.py")
    assert "nowhere/quick.py" in text and "demo" in text


def test_required_value(write):
    text = message(load_config, Needy, write("pass"))
    assert "path has no value" in text and "--config.path=VALUE" in text
    assert load_config(Needy, write("pass"), ["path=x"]).path == "x"


def test_describe_names_every_key_with_default_type_and_doc():
    text = describe(Run)
    assert "loss.optimizer.rate = 0.5  [float]\n      peak learning rate" in text
    assert "loss: what is minimised" in text
    assert "loss.kind = 'tokens'  [one of tokens, sequences]" in text
    assert "path = none  [str or none]" in text
    assert "path (required)  [str]" in describe(Needy)
    for key in config_io.keys_of(Run):
        assert f"  {key} " in text


def test_from_dict_names_its_source():
    text = message(from_dict, Run, {"stepz": 3}, "runs/a/config.json")
    assert text.startswith("runs/a/config.json: unknown key stepz")


rates = st.floats(min_value=0, allow_nan=False)
optimizers = st.builds(Optimizer, rate=rates, warmup=st.integers(), betas=st.tuples(rates, rates))
losses = st.builds(
    Loss,
    kind=st.sampled_from(["tokens", "sequences"]),
    clip=st.none() | rates,
    weights=st.dictionaries(st.text(min_size=1), rates, max_size=3),
    optimizer=optimizers,
)
runs = st.builds(
    Run,
    name=st.text(),
    path=st.none() | st.text(),
    steps=st.integers(min_value=5),
    resume=st.booleans(),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    tags=st.lists(st.text(), max_size=3).map(tuple),
    grid=st.lists(st.tuples(st.integers(), st.integers()), max_size=2).map(tuple),
    loss=losses,
    extra=st.none() | optimizers,
)


@given(runs)
def test_dict_round_trip(run):
    assert from_dict(Run, to_dict(run)) == run
