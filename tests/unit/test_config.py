"""Configuration: everything composes, Table 4 to the letter, names and hashes of runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sam_repro.config.checks import validate
from sam_repro.config.compose import compose_config, compose_with_hydra, fields_of, typed
from sam_repro.config.files import choices, compose_files, folders
from sam_repro.config.run_id import config_hash, run_id
from sam_repro.config.schema import Config
from sam_repro.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# GSAM paper, Table 4: rho_max, rho_min, alpha, lr, epochs, warm-up.
TABLE4 = {
    "resnet50": (0.04, 0.02, 0.01, 1.6, 90, 5000),
    "resnet101": (0.04, 0.02, 0.01, 1.6, 90, 5000),
    "resnet152": (0.04, 0.02, 0.005, 1.6, 90, 5000),
    "vit_s32": (0.6, 0.0, 0.4, 3e-3, 300, 10000),
    "vit_s16": (0.6, 0.0, 1.0, 3e-3, 300, 10000),
    "vit_b32": (0.6, 0.1, 0.6, 3e-3, 300, 10000),
    "vit_b16": (0.6, 0.2, 0.4, 3e-3, 300, 10000),
    "mixer_s32": (0.5, 0.0, 0.2, 3e-3, 300, 10000),
    "mixer_s16": (0.5, 0.0, 0.6, 3e-3, 300, 10000),
    "mixer_s8": (0.5, 0.1, 0.1, 3e-3, 300, 10000),
    "mixer_b32": (0.7, 0.2, 0.05, 3e-3, 300, 10000),
    "mixer_b16": (0.5, 0.2, 0.01, 3e-3, 300, 10000),
}


@pytest.mark.parametrize("model", TABLE4)
def test_table_4(model):
    cfg = compose_config([f"model={model}", "optim=gsam"])
    r, o = cfg.recipe, cfg.optim
    assert (o.rho_max, o.rho_min, o.alpha, r.lr, r.epochs, r.warmup_steps) == TABLE4[model]
    assert (r.schedule, r.lr_min_ratio, r.batch_size, r.clip, o.m) == ("linear", 0.01, 4096, 1.0, 64)
    resnet = model.startswith("resnet")
    assert (r.base, r.loss) == (("sgd", "softmax") if resnet else ("adamw", "sigmoid"))
    assert r.weight_decay == (1e-3 if resnet else 0.3)
    assert cfg.data.train_fraction == 0.99 and cfg.augment.crop == "inception" and cfg.augment.flip
    validate(cfg)


def test_the_literal_weight_decay_of_the_resnets_is_there():
    assert compose_config(["model=resnet50", "recipe=resnet_table4"]).recipe.weight_decay == 0.3


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("optim", choices("optim"))
def test_every_model_and_method_composes(model, optim):
    validate(compose_config([f"model={model}", f"optim={optim}"]))


@pytest.mark.parametrize("group", ["recipe", "augment", "data", "experiment", "debug"])
def test_every_file_composes(group):
    for name in choices(group):
        validate(compose_config([f"{group}={name}"]))


def test_every_field_is_documented():
    """A field without a comment beside it is a field nobody can use."""
    source = (ROOT / "sam_repro" / "config" / "schema.py").read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "Config":
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    beside, above = lines[item.end_lineno - 1], lines[item.lineno - 2].strip()
                    assert "#" in beside or above.startswith("#"), f"{node.name}.{ast.unparse(item.target)}"


def test_run_id_is_what_and_not_where():
    one = compose_config(["model=vit_b32", "optim=gsam"])
    assert run_id(one) == f"vit_b32-gsam-s0-{config_hash(one)}"
    same = compose_config(
        ["model=vit_b32", "optim=gsam", "data.root=/elsewhere", "data.workers=3", "log.wandb=disabled"]
    )
    assert run_id(same) == run_id(one)
    assert run_id(compose_config(["model=vit_b32", "optim=gsam", "seed=1"])) == run_id(one).replace("-s0-", "-s1-")
    assert config_hash(compose_config(["model=vit_b32", "optim=gsam", "optim.m=32"])) != config_hash(one)
    here, there, other = (
        compose_config(["model=vit_b32", f"log.runs_dir={runs}", f"init={start}"])
        for runs, start in (("runs", "runs/a-run"), ("/scratch/runs", "/scratch/runs/a-run"), ("/scratch", "w/a-run"))
    )
    assert run_id(here) == run_id(there) != run_id(other)


def test_typos_name_the_nearest_key():
    with pytest.raises(UserError, match="did you mean 'recipe.warmup_steps'"):
        compose_config(["recipe.warmup=3"])
    with pytest.raises(UserError, match="did you mean 'optim'"):
        compose_config(["optm=sam"])
    with pytest.raises(UserError, match="did you mean 'optim.rho_m.*keys of optim: name, kind, perturb"):
        compose_config(["optim.rho=0.1"])
    with pytest.raises(UserError, match="'lr'; did you mean 'recipe.lr'"):
        compose_config(["lr=1"])
    with pytest.raises(UserError, match=r"'optim.roh' \(keys of optim"):
        compose_config(["optim.roh=1"])
    with pytest.raises(UserError, match="there is no key 'optim.rho'"):
        compose_config(["+optim.rho=0.1"])  # Hydra adds it, and nothing would read it
    with pytest.raises(UserError, match="there is no key 'foo'"):
        compose_config(["++foo=0.1"])
    with pytest.raises(UserError, match=r"write \+model.kwargs.drop_path_rate=0.1"):
        compose_config(["model.kwargs.drop_path_rate=0.1"])
    with pytest.raises(UserError, match="^recipe.lr: Value 'abc'"):
        compose_config(["recipe.lr=abc"])
    with pytest.raises(UserError, match=r"^optim=\[sam,gsam\]: a run has one; -m optim=sam,gsam makes several"):
        compose_config(["optim=[sam,gsam]"])  # Hydra would merge them


EXPLAINED = {
    "seed=0,1": "^seed=0,1 are several runs: add -m$",
    "seed=range(1,3)": r"^seed=range\(1,3\) are several runs: add -m$",
    "data.root=a,b": "are several runs: add -m, or write \"data.root='a,b'\" for one value$",
    "data.eval_sets=val,v2": r"^data.eval_sets is a list: write data.eval_sets=\[val,v2\]$",
    "init=logs/epoch=9-step=100.ckpt": "^cannot read init=.* is quoted, \"init='logs/epoch=9-step=100.ckpt'\"$",
    "data.root=/images (new)": "is quoted, \"data.root='/images \\(new\\)'\"$",
    "data.root=it's": r"is quoted, \"data.root='it\\'s'\"$",
    "recipe.betas=[1,": r"^cannot read recipe.betas=\[1,: a list is written recipe.betas=\[a,b\]",
    "model.kwargs={a:{b:1}": r"a mapping model.kwargs=\{a:1,b:2\}",
    "recipe.lr": "^recipe.lr: options are written key=value$",
    "=3": "^=3: options are written key=value$",
    "+model=vit_b16": "^model is there already: write model=vit_b16$",
    "+recipe.lr=1": "^recipe.lr is there already: write recipe.lr=1$",
    "recipe=null": r"^recipe=null does not exist \(choices: cifar, ",
    "model=vit_b32,vit_b16": "are several runs: add -m$",
    "optim.alpha=${model.alhpa}": r"^Interpolation key 'model.alhpa' not found \(in optim.alpha=",
    "recipe.steps=1.5": r"^recipe.steps: Value '1.5' .* \(in recipe.steps=1.5\)$",
    # of a folder of the user's own
    "data=mine recipe.lrr=1": "^there is no key 'recipe.lrr'; did you mean 'recipe.lr'",
    "data=mine2": r"^data=mine2 does not exist; did you mean 'mine'\? \(choices: broken, cifar10, .*, mine, misspelt,",
    "data=misspelt": "^data/misspelt.yaml: there is no key 'data.num_clases'; did you mean 'data.num_classes'",
    "data=wordy": "^data/wordy.yaml: data.num_classes: Value 'abc' ",
    "data=broken": 'broken.yaml", line 1',
    "data=orphan": "^In 'data/orphan': Could not load 'data/nothere'",
}


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """A folder as --config-dir names it, with one file that is right."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data").mkdir()
    for name, text in {
        "mine": "name: mine\nnum_classes: 3\n",
        "misspelt": "num_clases: 3\n",
        "wordy": "num_classes: abc\n",
        "broken": "name: [x\n",
        "orphan": "defaults: [nothere, _self_]\nname: x\n",
    }.items():
        (folder / "data" / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("words", EXPLAINED)
def test_an_error_is_explained_by_itself_and_not_by_the_words_around_it(words, own_folder):
    words, sentence = words.split(" ") if words.startswith("data=mine ") else [words], EXPLAINED[words]
    around = ["debug=tiny", "data.root='a=b'", f"hydra.searchpath=[{own_folder}]"]
    with pytest.raises(UserError, match=sentence) as refused:
        compose_config([*around, *words, "seed=3"] if words != ["seed=0,1"] else [*around, *words])
    assert "\n" not in str(refused.value)


def test_the_command_line_knows_the_user_s_own_folder(own_folder):
    def train(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True)

    own = ("--config-dir", str(own_folder))
    assert "name: mine" in train(*own, "data=mine", "-c", "job").stdout
    assert ", mine, misspelt, " in train(*own, "--help").stdout
    assert "did you mean 'mine'? (choices: broken, cifar10" in train(*own, "data=_mine").stderr
    assert "'recipe.lrr'; did you mean 'recipe.lr'" in train(*own, "data=mine", "recipe.lrr=1").stderr
    missing = train("--config-dir", "/nowhere", "data=mine")
    assert missing.stderr == "error: there is no folder /nowhere with configuration files\n" and missing.returncode == 2
    assert train("--config-name", "mine").stderr.startswith("error: Cannot find primary config 'mine'")


def composed_both_ways() -> list[list[str]]:
    """Every file alone, files that choose for each other, and values of every kind."""
    alone = [[f"{folder}={name}"] for folder in folders() for name in choices(folder)]
    with_others = (["debug=tiny"], ["model=vit_b16"], ["recipe=cifar"], ["data=pets", "optim=sam", "data=flowers"])
    together = [[f"experiment={name}", *words] for name in choices("experiment") for words in with_others]
    values = "recipe.lr=1 recipe.lr=.5 recipe.lr=1e-3 recipe.lr=5. optim.m=8 optim.faithful_rho=True data.root=null "
    values += "data.root=/a-b/c.1 log.group=table1/vit_b32 recipe.betas=[0.9,1e-1] data.eval_sets=[val,v2] "
    values += "train.compile=null init=runs/a-b seed=3 recipe.steps=5 optim.alpha=${model.sam_rho} log.runs_dir=/x"
    added = ["model=vit_s16", "+model.kwargs.patch_size=4", "+model.kwargs.depth=8", "+model.tiny_kwargs.x=[1,.5]"]
    return [*alone, *together, added, *([word, "debug=tiny"] for word in values.split())]


def test_composing_without_hydra_is_hydra_s():
    for words in composed_both_ways():
        assert compose_files(words) == compose_with_hydra(words), words


@pytest.mark.parametrize(
    "words",
    [
        ["model=vit_s16", "+model.kwargs.weight_init=x"],  # is there already
        ["+model.kwargs.depth=8", "+model.kwargs.depth=9"],
        ["+recipe.lr=1"],
    ],
)
def test_a_key_that_cannot_be_added_is_left_to_hydra(words):
    assert compose_files(words) is None


@pytest.mark.parametrize("word", ["data.root=05", "data.name=12", "recipe.epochs=1_0", "data.root=a:b"])
def test_what_only_hydra_can_read_is_left_to_it(word):
    assert compose_files([word]) is None and compose_config([word]) == compose_with_hydra([word])


ROWS = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / "runs").glob("*.json"))]
STORED = list({json.dumps([{**row["config"], "seed": 0}, len(row["overrides"])]): row for row in ROWS}.values())


def test_stored_configurations_keep_their_names():
    """Whatever field is added: a row's own configuration still has the name that the row has. One of those per seed.

    Except those of the first demo, made when eigen_images had another default.
    """
    rows = [row for row in STORED if row["config"]["optim"]["eigen_images"] != "batch"]
    assert len(rows) >= len(STORED) - 3 > 100
    for row in rows:
        assert run_id(typed(OmegaConf.merge(OmegaConf.structured(Config), row["config"]))) == row["run_id"]


def test_the_words_of_stored_runs_still_name_them():
    """Except those of experiment=demo, whose files were tuned after some of its rows: they compose."""
    names = {row["run_id"]: run_id(compose_config(row["overrides"])) for row in STORED}
    other = {row["run_id"] for row in STORED if "experiment=demo" in row["overrides"]}
    assert len(names) > len(other) + 90
    assert {name for name, now in names.items() if name != now} <= other


def test_base_files_are_no_choice():
    """configs/model/_vit.yaml is what ViTs share; alone it has no name and no model."""
    train = [sys.executable, ROOT / "train.py"]
    listed = subprocess.run([*train, "--help"], capture_output=True, text=True, check=True).stdout
    assert f"\nmodel: {', '.join(choices('model'))}\n" in listed and "optim: asam, " in listed and "_vit" not in listed
    sentence = "model=_vit does not exist; did you mean 'vit_"
    for words in (["model=_vit"], ["-m", "model=vit_b32,_vit"], ["--cfg", "job", "model=_vit"]):
        refused = subprocess.run([*train, *words], capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {sentence}") and not refused.stdout
    with pytest.raises(UserError, match=sentence):
        compose_config(["model=_vit"])


BAD_NUMBERS = {
    "data.mean": ["[1,2]", "[0,0,nan]"],
    "data.std": ["[0,0,0]", "[1,1,inf]"],
    "data.train_fraction": [0, 1.1],
    "data.finetune_steps": [0],
    "augment.scale": ["[1]", "[0,1]", "[0.5,0.1]", "[0.1,2]"],
    "augment.ratio": ["[2,1]", "[0,1]"],
    "augment.pad": [-1],
    "train.threads": [-1],
    "seed": [2**63],
    "train.save_every_minutes": [-1],
    "recipe.momentum": [7, 1, -0.1, "nan"],
    "recipe.lr": [-1, "nan"],
    "recipe.betas": ["[1]", "[0.9,1]", "[-0.1,0.9]", "[0.9,nan]"],
    "recipe.eps": [-1],
    "recipe.weight_decay": [-0.1],
    "recipe.label_smoothing": [2],
    "recipe.steps": [0],
    "model.name": ["../../x", "a/b", "..", ".hidden"],
    "optim.name": ["../x"],
    "data.name": ["a b"],
    "data.label_noise": [1],
    "sharpness.batch": [0],
    "model.sam_rho": [-1],
}


@pytest.mark.parametrize("override", [f"{key}={value}" for key, values in BAD_NUMBERS.items() for value in values])
def test_numbers_that_types_cannot_express(override):
    with pytest.raises(UserError, match=rf"^{override.partition('=')[0]}=.* must "):
        validate(compose_config([override]))


def test_numbers_that_contradict_each_other():
    with pytest.raises(UserError, match="recipe.nesterov=true needs a momentum: set recipe.momentum=0.9"):
        validate(compose_config(["recipe.nesterov=true", "recipe.momentum=0"]))
    with pytest.raises(UserError, match="recipe.warmup_steps=10000 must not exceed the 99 .* recipe.warmup_steps=9$"):
        validate(compose_config(["recipe.steps=99"]))
    validate(compose_config(["recipe.steps=99", "recipe.warmup_steps=99", "recipe.momentum=0", "recipe.betas=[0,0]"]))


def test_keys_are_two_levels_deep():
    assert all(key.count(".") <= 1 for key in fields_of(Config))


def test_a_wrong_word_is_refused_before_torch_is_imported():
    program = """
import sys
sys.argv = ["train.py", "recipe.lr=-1"]
from sam_repro.cli.train import cli
try:
    cli()
except SystemExit as error:
    print(error.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2 False\n", "error: recipe.lr=-1.0 must be greater than 0\n")
