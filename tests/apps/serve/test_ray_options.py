"""The arguments of the Ray Serve application, without Ray."""

import pytest

from hawk_trt.apps.serve.ray_options import read_options
from hawk_trt.errors import InvalidInput
from trt_machine import engine_folder


def options_of(**arguments):
    return read_options(arguments)


def test_arguments_are_the_options_of_the_command_as_text_or_as_values(tiny_bundle):
    as_text = {"path": str(tiny_bundle), "keep_ratio": "0.3", "max_batch": "4", "no_page": "true", "max_replicas": "3"}
    as_values = {"path": str(tiny_bundle), "keep_ratio": 0.3, "max_batch": 4, "no_page": True, "max_replicas": 3}
    assert options_of(**as_text) == options_of(**as_values)
    options = options_of(**as_text, remote_host=["a.example", "b.example"], model_name="m", verify=False)
    settings = options.settings(options.path)
    assert (settings.pruning.keep_ratio, settings.max_batch, settings.page, settings.model_name) == (0.3, 4, False, "m")
    assert settings.remote_hosts == ("a.example", "b.example")
    assert (options.min_replicas, options.max_replicas, options.where.verify) == (1, 3, False)


def test_a_replica_takes_a_gpu_where_it_uses_one_and_else_a_cpu_for_each_thread(tiny_bundle, tmp_path):
    def resources(**arguments):
        options = options_of(path=str(tiny_bundle), **arguments)
        return options.resources["num_gpus"], options.resources["num_cpus"]

    assert resources() == (0, 1)
    assert resources(threads=4) == (0, 4)
    assert resources(device="cuda") == (1, 1)
    (tmp_path / "engines.json").touch()
    assert options_of(path=str(tmp_path)).resources["num_gpus"] == 1
    assert resources(device="cuda", num_gpus=0.5, num_cpus=2) == (0.5, 2)


def test_engines_answer_as_many_requests_together_as_they_have_slots(tiny_bundle, tmp_path):
    def rows(path, **arguments):
        return options_of(path=str(path), **arguments).rows

    inplace, portable = (engine_folder(tiny_bundle, tmp_path / target, target) for target in ("tensorrt", "portable"))
    assert (rows(tiny_bundle), rows(tiny_bundle, max_batch=3)) == (8, 3)
    assert (rows(inplace), rows(inplace, max_batch=3)) == (4, 3)
    assert (rows(portable), rows(portable, max_batch=3)) == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"path": None}, "path: missing"),
        ({"path": "no/such/folder"}, "no folder here. Give an absolute path"),
        ({"port": 80}, "port: Ray Serve opens the port"),
        ({"keep_ratio": "much"}, "keep_ratio: got 'much'"),
        ({"keep_rate": 0.2}, "keep_rate: unknown"),
        ({"model_name": True}, "model_name: got True"),
        ({"max_batch": 0}, "max_batch: got 0"),
        ({"max_batch": "2.5"}, "max.batch: got 2.5, expected an integer"),
        ({"min_replicas": 3}, "got 3 to 1, expected 0 <= min <= max"),
        ({"max_replicas": 0, "min_replicas": 0}, "got 0 to 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(tiny_bundle, arguments, reason):
    with pytest.raises(InvalidInput, match="(?s)" + reason):
        options_of(**{"path": str(tiny_bundle), **arguments})
