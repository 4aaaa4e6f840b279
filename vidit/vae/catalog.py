"""The classes of diffusers that code for a run, and the geometry that their `config.json` gives. No torch.

A folder says itself what it is: `_class_name`. A VAE is used as it was trained, so nothing of a folder's geometry can
be set by a run; what would load and be quietly wrong is refused here, before a device is touched.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from vidit.config import Vae
from vidit.config.vae import Kind

WEIGHTS = "diffusion_pytorch_model.safetensors"
Facts = Mapping[str, Any]


def borrowed_config(folder: Path, facts: Facts, option: str = "vae.weights") -> Vae:
    """The section of a folder whose `config.json` holds `facts`, with only what the folder decides.

    option: of the config, that the folder was given as, for messages.

    ValueError for a class that is not among `kind`, a geometry that it cannot code, or weights that are not there.
    """
    name, known = str(facts.get("_class_name")), [kind for kind in get_args(Kind) if kind != "causal"]
    if name not in known:
        # What training begins with is made ours (`vidit/vae/image_kl.py`), which only the class for images can be.
        usable = ["AutoencoderKL"] if option == "vae_train.init" else known
        raise ValueError(f"{folder / 'config.json'} is of class {name!r}; as {option} use one of {' '.join(usable)}")
    _check_weights(folder)
    for entry, (wanted, fits) in _ENTRIES.get(name, {}).items():
        if entry in facts and not fits(facts[entry]):
            raise ValueError(
                f"{folder / 'config.json'} of {name} has {entry}={facts[entry]!r}, and it is {wanted}; copy the file "
                "again"
            )
    try:
        channels, time, space, pixels = _GEOMETRY[name](facts)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} of {name} lacks {error}; copy the file again") from error
    for side in ("in_channels", "out_channels"):
        if facts.get(side, pixels) != pixels:
            raise ValueError(
                f"{folder} codes {side}={facts[side]}, and RGB takes {pixels}; give a VAE of videos or images in colour"
            )
    if name == "AutoencoderKLWan" and time != 4:
        raise ValueError(f"{folder} has a temporal stride of {time}, and AutoencoderKLWan codes 4 frames at a time")
    return Vae(weights=str(folder), kind=name, latent_channels=channels, strides=(time, space))


def _check_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    held = " ".join(sorted(path.name for path in folder.iterdir() if path.name != "config.json")) or "nothing"
    raise ValueError(
        f"{folder} has no {WEIGHTS}, but {held}; no other format is read, and nothing is unpickled: save it with "
        "save_pretrained(FOLDER, max_shard_size='100GB')"
    )


Geometry = tuple[int, int, int, int]
"""(latent channels, temporal stride, spatial stride, channels of the pixels that the first layer sees)."""


def _image(c: Facts) -> Geometry:
    return c["latent_channels"], 1, 2 ** (len(c["block_out_channels"]) - 1), 3


def _cogvideox(c: Facts) -> Geometry:
    time = int(c.get("temporal_compression_ratio", 4))
    return c["latent_channels"], time, 2 ** (len(c["block_out_channels"]) - 1), 3


def _hunyuan(c: Facts) -> Geometry:
    strides = (int(c.get(f"{name}_compression_ratio", n)) for name, n in (("temporal", 4), ("spatial", 8)))
    return c["latent_channels"], *strides, 3


def _wan(c: Facts) -> Geometry:
    patch = c.get("patch_size") or 1
    return c["z_dim"], 2 ** sum(c["temperal_downsample"]), patch * 2 ** (len(c["dim_mult"]) - 1), 3 * patch**2


def _is_count(x: object) -> bool:
    return type(x) is int and x > 0


def _is_list_of(fits: Callable[[object], bool], x: object) -> bool:
    return isinstance(x, list) and bool(x) and all(fits(part) for part in x)


# Of a class: what an entry is, and whether a value is that. What a file lacks is for whoever reads the entry.
_Entry = tuple[str, Callable[[object], bool]]
_COUNT: _Entry = ("a whole number above 0", _is_count)
_FLAG: _Entry = ("true or false", lambda x: isinstance(x, bool))
_NAMES: _Entry = ("a list of names", lambda x: _is_list_of(lambda part: isinstance(part, str), x))
_COUNTS: _Entry = ("a list of whole numbers above 0", lambda x: _is_list_of(_is_count, x))
_SCALE: _Entry = ("a number above 0", lambda x: type(x) in (int, float) and 0 < cast(float, x) < math.inf)
_STRIDE: _Entry = ("a whole number above 0", lambda x: _is_count(int(x) if type(x) is float and x.is_integer() else x))
_LAYERS = dict.fromkeys(("latent_channels", "layers_per_block", "norm_num_groups"), _COUNT)
_LAYERS |= {"block_out_channels": _COUNTS, "scaling_factor": _SCALE}
_ENTRIES: dict[str, dict[str, _Entry]] = {
    "AutoencoderKLCogVideoX": {**_LAYERS, "temporal_compression_ratio": _STRIDE},
    "AutoencoderKLHunyuanVideo": {
        **_LAYERS,
        **dict.fromkeys(("temporal_compression_ratio", "spatial_compression_ratio"), _STRIDE),
    },
    "AutoencoderKLWan": {
        **dict.fromkeys(("z_dim", "base_dim", "num_res_blocks"), _COUNT),
        "dim_mult": _COUNTS,
        "temperal_downsample": (
            "a list of true or false",
            lambda x: _is_list_of(lambda part: isinstance(part, bool), x),
        ),
        "patch_size": ("null or a whole number above 0", lambda x: x is None or _is_count(x)),
    },
    "AutoencoderKL": {
        **_LAYERS,
        **dict.fromkeys(("down_block_types", "up_block_types"), _NAMES),
        **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), _FLAG),
    },
}
_GEOMETRY: dict[str, Callable[[Facts], Geometry]] = {
    "AutoencoderKL": _image,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLHunyuanVideo": _hunyuan,
    "AutoencoderKLWan": _wan,
}
