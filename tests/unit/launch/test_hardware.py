"""Profiles of hardware: all of ours load, and faults are named."""

from pathlib import Path

import pytest

from cluster.health.asked import read_bands
from launch.hardware import PROFILES, read_hardware
from launch.site import SITES, Site, read_site
from vidit.config import ConfigError

NAMES = sorted(path.stem for path in PROFILES.glob("*.toml"))
GOOD = 'kind = "cpu"\ndevices = 1\nmemory_bytes = 1e9\nmemory_bytes_s = 1e9\n[flops]\nfp32 = 1e9\n'


@pytest.mark.parametrize("name", NAMES)
def test_profiles(name: str) -> None:
    found = read_hardware(name)
    assert {rate: tuple(band) for rate, band in found.health.items()} == read_bands(name)
    band = found.health.get("matmul_flops")
    assert band is None or band[1] == found.flops["bf16"], "no sound device is faster than its peak"
    assert found.flops.get("fp8", 0) in (0, 2 * found.flops.get("fp16", 0))


def test_the_profiles_that_planners_ask_for() -> None:
    assert {"h100_sxm", "h200_sxm", "a100_80gb", "cpu_test"} <= set(NAMES)
    assert read_hardware("h100_sxm").flops["bf16"] == 989.5e12


@pytest.mark.parametrize("name", sorted(path.stem for path in SITES.glob("*.toml")))
def test_every_site_names_its_hardware(name: str) -> None:
    assert read_hardware(read_site(name).hardware or "").devices >= (read_site(name).devices or 1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD.replace("devices = 1", "devices = 0"), "devices: "),
        (GOOD.replace("fp32 = 1e9", "fp32 = 0"), "flops: Value error, fp32 = 0 is not above 0"),
        (GOOD.replace("fp32", "fp31"), "flops.fp31"),
        (GOOD + "[health]\nmatmul_flops = [2, 1]\n", "health.matmul_flops = [2, 1] is no band"),
        (GOOD + "[health]\nspeed = [1, 2]\n", "health.speed"),
        ("color = 1\n" + GOOD, "color: "),
        ("devices = = 1", "line 1"),
    ],
)
def test_faults(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hardware(str(tmp_path / "mine.toml"))
    assert fault in "\n".join(caught.value.faults)


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match="use one of a100_80gb cpu_test"):
        read_hardware("h100")


def test_a_site_that_does_not_fit_its_hardware(tmp_path: Path) -> None:
    for text, fault in (
        ('devices = 9\nhardware = "h100_sxm"', "devices=9, and a node of hardware h100_sxm has 8"),
        ('[health]\ncommand = ["x", "{hardware}"]', "the site names none"),
        ('hardware = "none_such"', "no hardware 'none_such'"),
    ):
        (tmp_path / "mine.toml").write_text(text)
        with pytest.raises(ConfigError, match=fault):
            read_site(str(tmp_path / "mine.toml"))
    assert Site(hardware="h100_sxm", devices=4).devices == 4
