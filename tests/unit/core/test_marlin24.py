"""`marlin-24` checkpoints: bytes that compressed-tensors 0.9.4 made of codes that a formula gives."""

import base64
import itertools
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgesft.core import marlin24, models, stored
from edgesft.core.errors import ArtifactError
from edgesft.core.marlin24 import Marlin24, Scheme
from edgesft.core.stage import execute
from edgesft.core.stored import Stored
from edgesft.core.weights import Weights
from edgesft.kernels.nm_matmul import layout
from edgesft.stages.convert import Convert

WORDS = (
    "c-n<iLD?)Z2vdLsEEEe^z(Orx1q-!+1}xM97JB%@es8aDZ_RXugd`)iSLpK=KReD6+ZFkgMGuv{YgDU){j$)Kx{qvWbl#R@H(0g(H"
    "sLN_u1@ddjafzO@yhJ>!KW^G%9UM{Fv|{jO3%LMnFY?=r03kb2d^}C=`FM|_^qXuep+O28eIC4uT#`BXmGlC6YAEB<;_eY_k#_xx_N"
    "lWc2ull&m5k??4J9QfT0v>2jfn{DjIW>S!tgeRrbZuaMv^NG|vp&Egu_jaUS-zD9=`C_~2!R<zT}llEB_j#p(?nie5ZkZ=9hasvoEH"
    "A&j!Z6R#Yv2M>>Vq+XYUQN#1i;i<t`EWY!?Ya5I;SvO=oWQ@5D`ANEw@f!@^@+^FtSnV_++nAglkJm|i9g`pZz(j4)jXMMp3KE_^+_"
    "eK*`By(CH>-L$yY8gPZE$eGAicl(0W0Bkq9}M1>cX&^y6<!3gMaj6GDL0%3~RFeWGZrAt@rK2|N1dACbu3NCQ$TYa%<LvhWo1@Ps7L"
    "Si!(Gl^xXNNau|iQ<5xevIan5q#p3_|)4^ENfA!-JH)Q`_"
)
META = (
    "c-rNUp#cC<2twy`I2v=29fBe56DY25;S~`<65wN33Nv;9W&$aNT`~aC>}-b4?cGqH1Oz)8na$97@7CActJl}u+voP}AI-"
    "geZeRZV{}131RR{"
)
NAME = "model.layers.0.self_attn.q_proj"
SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "marlin-24",
    "config_groups": {"group_0": {"weights": SCHEME, "input_activations": None, "targets": ["Linear"]}},
}


def codes() -> "np.ndarray[Any, Any]":
    pairs, values = list(itertools.combinations(range(4), 2)), [*range(-8, 0), *range(1, 8)]
    found = np.zeros((64, 64), np.int8)
    for row, group in itertools.product(range(64), range(16)):
        for place in pairs[(row * 7 + group * 3 + row // 6) % 6]:
            column = 4 * group + place
            found[row, column] = values[(row * 5 + column * 3 + row // 9) % 15]
    return found


def parts(name: str = NAME) -> dict[str, Tensor]:
    def read(text: str, kind: str) -> Tensor:
        raw = np.frombuffer(zlib.decompress(base64.b85decode(text)), kind)
        return torch.from_numpy(raw.reshape(2, -1).copy())

    scales = torch.tensor([2.0 ** -(row % 5) for row in range(64)]).half()[None]
    return {
        f"{name}.weight_packed": read(WORDS, "<i4"),
        f"{name}.meta": read(META, "<i2"),
        f"{name}.scale_packed": scales,
    }


def weights(path: Path, tensors: dict[str, Tensor]) -> Weights:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "x.safetensors")
    return Weights(path / "x.safetensors")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with one layer in `marlin-24`."""
    out = Path(shutil.copytree(tiny_model, tmp_path / "marlin"))
    tensors = load_file(out / "model.safetensors")
    del tensors[f"{NAME}.weight"]
    save_file(tensors | parts(), out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": CONFIG}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_the_bytes_of_the_library(tmp_path: Path) -> None:
    found = Marlin24(weights(tmp_path, parts("x")), Scheme(4, 0))
    assert found.shape("x.weight") == (64, 64)
    packed = found["x.weight"]
    assert (packed.value, packed.group, packed.pattern) == ("int4", 0, "2:4")
    assert np.array_equal(layout.codes_of(packed), codes())
    assert layout.scales_of(packed)[:6, 0].tolist() == [1, 0.5, 0.25, 0.125, 0.0625, 1]


def test_scales_of_groups_are_in_an_order_of_their_own() -> None:
    order = [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
    plain = np.arange(4 * 64, dtype=np.float16).reshape(4, 64)
    assert np.array_equal(marlin24._scales(plain[:, order], 512, 128), plain.T)
    assert np.array_equal(marlin24._scales(plain[:2], 256, 128), plain[:2].T)  # as short ones are stored


def test_in_a_model(folder: Path, tmp_path: Path) -> None:
    model = models.load(models.resolve(str(folder)).path)
    layer: Any = model.get_submodule(NAME)
    scale = np.array([2.0 ** -(row % 5) for row in range(64)], np.float32)[:, None]
    assert np.array_equal(layer.weight.dequantize().numpy(), codes() * scale)
    stage = Convert.from_options({"to": "nm-packed"})
    made, _ = execute(stage, {"model": models.resolve(str(folder))}, tmp_path / "p")
    assert made.metrics["matrices"] == {"2:4": 1, "dense": 13}
    packed = Stored(made.path).packed[f"{NAME}.weight"]
    assert packed.group == 64
    assert np.array_equal(layout.dense(packed), codes() * scale)  # codes and scales are what they were


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x.meta": None}, r"there is no `x\.meta`"),
        ({"x.meta": torch.zeros(2, 128, dtype=torch.int16)}, "are not in order"),
        ({"x.meta": torch.zeros(2, 64, dtype=torch.int16)}, "are not of a matrix 64 x 64"),
        ({"x.meta": torch.zeros(2, 128)}, r"`x\.meta` is F32"),
        ({"x.weight_packed": torch.zeros(2, 120, dtype=torch.int32)}, "words are no matrix"),
        ({"x.scale_packed": torch.full((1, 64), torch.inf).half()}, "scale is not finite"),
        ({"x.scale_packed": torch.ones(2, 64).half()}, "are not of a matrix"),
        ({"x.weight": torch.ones(64, 64)}, "plain as well"),
    ],
)
def test_parts_that_do_not_go_together(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    held = weights(tmp_path, {name: t for name, t in (parts("x") | change).items() if t is not None})
    with pytest.raises(ArtifactError, match=words):
        Marlin24(held, Scheme(4, 0))["x.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_bits": 3}, "symmetric int4 and int8 in groups of 128"),
        ({"symmetric": False}, "symmetric int4"),
        ({"type": "float"}, "symmetric int4"),
        ({"strategy": "group", "group_size": 64}, "in groups of 128"),
    ],
)
def test_schemes_that_it_has_not(folder: Path, change: dict[str, Any], words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=words):
        stored.form(folder)
