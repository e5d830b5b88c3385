"""Configurations: what is taken where nothing is said."""

from s3t_ext.system.config import Config


def test_the_usual_strategy_is_affordable() -> None:
    assert (Config().strategy, Config(slices=6).strategy) == ("subsets", "subsets")
    assert (Config(slices=7).strategy, Config(budget=3).strategy) == ("rotation", "rotation")
    assert len(Config(slices=8).tree().sequences) == 8
    assert Config.from_dict({"slices": 8, "strategy": "subsets"}).strategy == "subsets"
