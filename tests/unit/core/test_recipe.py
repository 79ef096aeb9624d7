"""Recipes: what they say, how they are overridden, and how mistakes are answered."""

import pytest

from edgesft.core import catalog, recipe
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.recipe import Recipe

SPARSE = Recipe("r", "", {"tune": {"lr": 1e-4, "select": {"use": "small-magnitude", "density": 0.25}}})


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_names_methods_that_exist(name):
    for stage, table in recipe.load(name).tables.items():
        for key, value in table.items():
            if key in catalog.AXES:
                assert recipe.HOME[key] == stage
                catalog.build(key, dict(value))
    assert recipe.load(name).summary


def test_set_reaches_axis_stage_and_own_value():
    changed = recipe.override(SPARSE, ["select.density=0.1", "tune.steps=7", "lr=2e-5"], "tune")
    assert changed.tables["tune"] == {
        "lr": 2e-5,
        "steps": 7,
        "select": {"use": "small-magnitude", "density": 0.1},
    }
    assert changed.overridden == {"tune.select.density", "tune.steps", "tune.lr"}
    assert SPARSE.tables["tune"]["lr"] == 1e-4


def test_another_method_drops_the_former_ones_values():
    changed = recipe.override(SPARSE, ["select.use=magnitude"])
    assert changed.tables["tune"]["select"] == {"use": "magnitude"}
    same = recipe.override(SPARSE, ["select.use=small-magnitude"])
    assert same.tables["tune"]["select"]["density"] == 0.25


def test_values_are_toml_else_text():
    changed = recipe.override(SPARSE, ["tune.a=1e-5", "tune.b=true", "tune.c=word", "tune.d=[1, 2]"])
    table = changed.tables["tune"]
    assert (table["a"], table["b"], table["c"], table["d"]) == (1e-5, True, "word", [1, 2])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("density", "key=value"),
        ("selct.density=1", "no stage or axis `selct`"),
        ("tune.selct.density=1", "`selct` is not an axis"),
        ("tune.a.b.c=1", "expected STAGE"),
        ("=1", "key=value"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(UsageError, match=message):
        recipe.override(SPARSE, [setting])


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        recipe.load("quickstrat")
    assert caught.value.hint == "did you mean `quickstart`?"


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        recipe.load(str(tmp_path / "no.toml"))
    bad = tmp_path / "bad.toml"
    bad.write_text("[tune\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        recipe.load(str(bad))
    bad.write_text("[tuen]\n")
    with pytest.raises(UsageError, match="tuen") as caught:
        recipe.load(str(bad))
    assert "`tune`" in caught.value.hint
    bad.write_text("[tune]\ncompress = { use = 'wanda' }\n")
    with pytest.raises(UsageError, match="belongs into"):
        recipe.load(str(bad))
