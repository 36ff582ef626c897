"""Two machines of a Ray cluster, on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray_runs import CONFIG, QUESTIONS, comparable

from fusion_lens.experiment import run
from fusion_lens.models import HookedModel
from fusion_lens.ray_engine import RayEngine
from fusion_lens.recipes import Recipe

ray: Any = pytest.importorskip("ray", reason="Ray is an extra of its own")


def test_two_machines_of_a_cluster_share_the_work(
    tiny: HookedModel, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two raylets on loopback, each with room for one worker."""
    from ray.cluster_utils import Cluster

    # a machine's own setting: else its workers give way to the tests beside this one
    monkeypatch.setenv("RAY_worker_niceness", "0")
    run(tiny, QUESTIONS, CONFIG, out=tmp_path / "alone", progress=False)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False},
        connect=False,
    )
    try:
        cluster.add_node(num_cpus=1)
        recipe = Recipe(str(tiny_folder), dtype="float32", device="cpu")
        with RayEngine(recipe, workers=2, address=cluster.address) as engine:
            assert engine.workers == 2
            homes = {ray.get(actor.home.remote())[0] for actor in engine._actors}
            assert len(homes) == 2
            run(engine, QUESTIONS, CONFIG, out=tmp_path / "both", progress=False)
        assert comparable(tmp_path / "both")["lines"] == comparable(tmp_path / "alone")["lines"]
    finally:
        ray.shutdown()
        cluster.shutdown()
