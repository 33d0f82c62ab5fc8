"""One network of each of timm's architectures builds as `family: other`, computes what timm's does, and trains."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator

import pytest
import timm
import torch
from torch.testing import assert_close

from sam_repro.config.compose import compose_config
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import UserError
from sam_repro.models.build import build_model, takes_size
from sam_repro.training.method import gradient_step

pytestmark = pytest.mark.usefixtures("one_thread")

# The smallest network of every module of timm: those that take a second or two, and the others.
QUICK = re.findall(
    r"\w+",
    """
    test_byobnet test_convnext dla46x_c test_efficientnet test_mambaout test_coatnet test_nfnet test_resnet
    starnet_s050 test_vit test_vit_relpos
    """,
)
SLOW = re.findall(
    r"\w+",
    """
    coat_tiny xcit_nano_12_p8_224 deit_tiny_distilled_patch16_224 efficientvit_m0 beit_base_patch16_224 halonet_h1
    cait_xxs24_224 convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
    cspnext_tiny davit_tiny densenet121 dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    efficientvim_m1 efficientvit_b0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf
    gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0
    poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large pvt_v2_b0
    rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnetv2_18 rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
    vgg11 visformer_tiny vit_tiny_r_s16_p8_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_slim_dw legacy_xception xception41p
    """,
)
NO_CLASSIFIERS = {"deepseek_vit", "gemma4_vit", "qwen3_vit"}  # the image halves of language models


@pytest.fixture(autouse=True)
def _no_network_stays() -> Iterator[None]:
    """Those of one test are in reference cycles, too few objects for Python to look: 80 of them filled 23 GB."""
    yield
    gc.collect()


def test_every_architecture_is_here():
    modules = {sys.modules[timm.model_entrypoint(name).__module__].__name__.rsplit(".", 1)[1] for name in QUICK + SLOW}
    assert modules | NO_CLASSIFIERS >= set(timm.list_modules())


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_any_classifier_of_timm_builds_and_trains(name):
    size = (timm.get_pretrained_cfg(name).input_size or (3, 224, 224))[-1]
    if not takes_size(name) and name not in ("halonet_h1", "convmixer_768_32"):  # whose windows and patches are odd
        size = 96
    words = [
        "model=resnet50",
        "model.family=other",
        f"model.timm={name}",
        f"data.image_size={size}",
        "recipe.loss=softmax",
    ]
    cfg = compose_config([*words, "data.num_classes=10", "optim=gsam", "optim.m=2", "recipe.batch_size=2"])
    torch.manual_seed(0)
    ours = build_model(cfg.model, num_classes=10, image_size=size)
    theirs = timm.create_model(name, num_classes=10, **({"img_size": size} if takes_size(name) else {}))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-3)
    before = [p.detach().clone() for p in ours.parameters()]
    step = gradient_step(cfg, ours.train(), Ranks(0, 1, 0, 1, torch.device("cpu")), local_batch=2, bf16=False)
    images = torch.randint(255, (2, 3, size, size), dtype=torch.uint8)
    assert step(images, torch.tensor([1, 3]), rho=0.05, seed=1).isfinite().all()
    assert all(torch.equal(p, q) and p.device.type == "cpu" for p, q in zip(before, ours.parameters(), strict=True))
    assert sum(p.grad is not None and bool(p.grad.any()) for p in ours.parameters()) > len(before) / 2


REFUSED = {
    "vit swin_tiny_patch4_window7_224": "=vit is for a VisionTransformer .* is a SwinTransformer: model.family=other",
    "mixer deit_tiny_patch16_224": "model.family=mixer is for an MlpMixer",
    "vit deit_tiny_distilled_patch16_224": "one linear head, and deit_tiny_distilled_patch16_224",
    "vit vit_small_patch16_rope_224": "is a Eva",
    "resnet levit_128s": "model.family=resnet is for a network and one linear head, and levit_128s is a Levit",
    "vit convnext_atto": "unexpected keyword argument 'img_size'; model.family=other gives img_size only to those",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_of_another_family_is_refused(case):
    family, name = case.split()
    cfg = compose_config(["model=resnet50", f"model.family={family}", f"model.timm={name}"]).model
    with torch.device("meta"), pytest.raises(UserError, match=REFUSED[case]):
        build_model(cfg, num_classes=10, image_size=224)


@pytest.mark.parametrize(
    ("words", "size", "sentence"),
    [
        ("model=vit_s32", 10, "^data.image_size=10 is no multiple of vit_s32's patches of 32 pixels: 32 is$"),
        ("model=vit_s32", 70, "patches of 32 pixels: 64 or 96 is$"),
        ("model=mixer_s8", 70, "patches of 8 pixels: 64 or 72 is$"),
        ("model=resnet50 model.timm=convnext_atto", 70, "patches of 4 pixels: 68 or 72 is$"),
        ("model=resnet50 model.timm=inception_v3", 40, "does not take images of 40 pixels: Calculated padded"),
        ("model=resnet50 model.timm=vgg11 model.family=other", 16, "vgg|resnet50 does not take|is too small"),
    ],
)
def test_images_whose_pixels_would_be_lost_are_refused(words, size, sentence):
    with torch.device("meta"), pytest.raises(UserError, match=sentence):
        build_model(compose_config(words.split()).model, num_classes=10, image_size=size)


def test_a_model_names_its_recipe(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\ntimm: convnext_atto\nfamily: other\n")
    own = f"hydra.searchpath=[{tmp_path}]"
    with pytest.raises(UserError, match="^no recipe is named: add recipe=cifar, .* in configs/model/mine.yaml$"):
        compose_config([own, "model=mine"])
    assert compose_config([own, "model=mine", "recipe=resnet"]).recipe.base == "sgd"
