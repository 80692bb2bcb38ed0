"""A run that is looked into: traces of some steps on each rank, and deterministic kernels."""

import gzip
import json
from collections import Counter
from pathlib import Path

from tests.lives import live, write_recipe


def phases_of(trace: Path) -> Counter[str]:
    """How often each phase was marked."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_the_steps_asked_for_are_traced_on_each_rank_with_their_phases_by_name(
    tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_data, tiny_reference, 5)
    life = live(tmp_path / "run", recipe, 2, settings=["logging.profile_steps=[2, 3]", "training.deterministic=true"])
    assert life.codes == [0, 0], life.printed
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["rank-00000-steps-2-3.json.gz", "rank-00001-steps-2-3.json.gz"]

    # Two steps of two micro-steps each, and what is fetched ahead of the step after each.
    expected = {"reference": 4, "policy": 4, "loss": 4, "exchange": 4, "backward": 4, "step": 4, "data": 2}
    for trace in traces:
        phases = phases_of(trace)
        assert {name: phases[name] for name in expected} == expected
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["deterministic_kernels"] is True

    # A longer run, and steps that are over by then.
    longer = write_recipe(tmp_path / "recipe.yaml", tiny_data, tiny_reference, 6)
    life = live(tmp_path / "run", longer, 2, settings=["--allow-changed", "logging.profile_steps=[1, 4]"])
    assert life.codes == [0, 0], life.printed
    assert "nothing is traced, since the run goes on after step 5, and steps 1 to 4 are over" in life.printed[0]
