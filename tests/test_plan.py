"""Plans: what is counted is what is there, loops are multiplied out, verdicts and exit status."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import occ_jax.planning.machines
import occ_jax.planning.plan
from occ_jax.cli.arguments import main
from occ_jax.config import MeshConfig, MTPConfig
from occ_jax.errors import UserError
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import make_mesh, state_shardings
from occ_jax.planning.flops import count_flops
from occ_jax.planning.hlo import collective_bytes, largest_arrays
from occ_jax.planning.machines import GIB, Machine, virtual
from occ_jax.planning.plan import Plan, Program, per_device, plan, wanted
from occ_jax.planning.report import render, to_json, verdict
from occ_jax.rl.train_step import place_state
from tests.tiny import config_file, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A loop of six, whose body gathers f32[2,8] to f32[4,8] once (its start and its end name it) and
# runs an inner loop of three that adds up bf16[16]; then a scatter from s32[64] to s32[16], and a
# branch that permutes u8[100]. Shapes in the calls' signatures are not arrays that are made.
LOOPS = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation.start (p: f32[2,8]) -> (f32[2,8], f32[4,8], u32[]) {
  %p = f32[2,8]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[4,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %custom-call.1 = (f32[2,8], f32[4,8], u32[]{:S(2)}) custom-call(%all-gather.1)
}

%fused_computation.done (q: f32[2,8]) -> f32[4,8] {
  %q = f32[2,8]{1,0:T(8,128)} parameter(0)
  %all-gather.2 = f32[4,8]{1,0:T(8,128)} all-gather(%q), channel_id=7, dimensions={0}
  ROOT %custom-call.2 = f32[4,8] custom-call(%all-gather.2), custom_call_target="Done"
}

%inner_body (i: (s32[], bf16[16])) -> (s32[], bf16[16]) {
  %i = (s32[], bf16[16]{0}) parameter(0)
  %x = bf16[16]{0} get-tuple-element(%i), index=1
  %all-reduce.1 = bf16[16]{0} all-reduce(%x), channel_id=8, replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %out = (s32[], bf16[16]{0}) tuple(%n, %all-reduce.1)
}

%inner_condition (i: (s32[], bf16[16])) -> pred[] {
  %i.1 = (s32[], bf16[16]{0}) parameter(0)
  %limit.1 = s32[]{:T(128)} constant(3)
  %n.1 = s32[] get-tuple-element(%i.1), index=0
  ROOT %lt.1 = pred[] compare(%n.1, %limit.1), direction=LT
}

%outer_body (o: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %o = (s32[], f32[2,8]{1,0}) parameter(0)
  %g = f32[2,8]{1,0} get-tuple-element(%o), index=1
  %start = (f32[2,8], f32[4,8], u32[]) fusion(%g), kind=kCustom, calls=%fused_computation.start
  %done = f32[4,8]{1,0} fusion(%g), kind=kCustom, calls=%fused_computation.done, metadata={op_name="gathered"}
  %while.1 = (s32[], bf16[16]{0}) while(%t), condition=%inner_condition, body=%inner_body
  ROOT %out.1 = (s32[], f32[2,8]{1,0}) tuple(%n.2, %g)
}

%outer_condition (o: (s32[], f32[2,8])) -> pred[] {
  %o.1 = (s32[], f32[2,8]{1,0}) parameter(0)
  ROOT %lt.2 = pred[] custom-call(%o.1), custom_call_target="opaque"
}

%true_branch (t: u8[100]) -> u8[100] {
  %t.1 = u8[100]{0} parameter(0)
  %start.2 = (u8[100]{0}, u8[100]{0}, u32[], u32[]) collective-permute-start(%t.1), channel_id=3
  ROOT %done.2 = u8[100]{0} collective-permute-done(%start.2)
}

ENTRY %main.5_spmd (arg: f32[2,8]) -> s32[16] {
  %arg = f32[2,8]{1,0} parameter(0)
  %big = s32[64]{0:T(1024)} iota(), iota_dimension=0, metadata={op_name="jit(f)/iota"}
  %chip = s32[99]{0:T(1024)S(1)} iota(), iota_dimension=0
  %while.2 = (s32[], f32[2,8]{1,0}) while(%tuple), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"6"}}
  %branch = u8[100]{0} conditional(%p, %c, %c), branch_computations={%true_branch, %add}
  ROOT %reduce-scatter.1 = s32[16]{0} reduce-scatter(%big), channel_id=9, dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_in_loops_count_as_often_as_the_loops_run():
    assert collective_bytes(LOOPS) == {
        "all-gather": 6 * 4 * 8 * 4,
        "all-reduce": 6 * 3 * 16 * 2,
        "collective-permute": 100,
        "reduce-scatter": 64 * 4,
    }


def test_the_largest_arrays_are_those_made_in_main_memory():
    # The iota of 396 bytes lies on the chip; what a fusion makes inside itself is nowhere.
    assert largest_arrays(LOOPS, 3) == [
        (256, "s32[64]  jit(f)/iota"),
        (128, "f32[4,8]  gathered"),
        (100, "u8[100]  collective-permute-done"),
    ]


def test_a_compiled_programs_collectives_are_those_it_was_written_with():
    mesh = make_mesh(MeshConfig(fsdp=8))

    def body(x, _):
        # 8 devices hold [2, 4] each: whole it is [16, 4], of which each keeps its own two rows.
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True), None

    def run(x):
        return jax.lax.scan(body, x, length=5)[0]

    spread = jax.shard_map(run, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    text = jax.jit(spread).lower(jnp.ones((16, 4))).compile().as_text()
    assert collective_bytes(text) == {
        "all-gather": 5 * 16 * 4 * 4,
        "reduce-scatter": 5 * 16 * 4 * 4,
    }


def flops(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.jit(function).trace(*arrays).jaxpr)


def test_products_are_counted_with_their_loops():
    product = 2 * 3 * 4 * 5

    def scanned(x, y):
        return jax.lax.scan(lambda c, _: (c + x @ y, None), jnp.zeros((3, 5)), length=7)[0]

    def until(x, y):
        def going(carry):
            return (carry[0] < 9) & (carry[1][0, 0] < 100.0)

        def once(carry):
            return carry[0] + 1, carry[1] + x @ y

        return jax.lax.while_loop(going, once, (0, jnp.zeros((3, 5))))

    def either(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ y + x @ y, lambda: x @ y)

    assert flops(lambda x, y: x @ y, (3, 4), (4, 5)) == product
    assert flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (2, 3, 4), (2, 4, 5)) == 2 * product
    assert flops(scanned, (3, 4), (4, 5)) == 7 * product
    assert flops(until, (3, 4), (4, 5)) == 9 * product
    assert flops(either, (3, 4), (4, 5)) == 2 * product


def test_a_backward_pass_counts_what_it_computes_again():
    def two(x, y):
        return jnp.sum(jnp.sin(jnp.sin(x @ y) @ y.T))

    kept = jax.grad(two, argnums=(0, 1))
    again = jax.grad(jax.checkpoint(two), argnums=(0, 1))
    product = 2 * 3 * 4 * 5
    assert flops(kept, (3, 4), (4, 5)) == 6 * product
    assert flops(again, (3, 4), (4, 5)) == 8 * product


def test_a_grouped_product_counts_every_row_once():
    def grouped(rows, matrices):
        return jax.lax.ragged_dot(rows, matrices, jnp.array([2, 4], jnp.int32))

    once = 2 * 6 * 3 * 5
    assert flops(grouped, (6, 3), (2, 3, 5)) == once
    both = jax.grad(lambda rows, matrices: jnp.sum(grouped(rows, matrices)), argnums=(0, 1))
    assert flops(both, (6, 3), (2, 3, 5)) == 3 * once


def test_manual_programs_count_on_every_device():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    spread = jax.shard_map(
        lambda x, y: x @ y, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp")
    )
    # A quarter of the rows each, on all eight of them.
    assert flops(spread, (8, 3), (3, 5)) == 8 * 2 * 2 * 3 * 5


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("plan"))
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=2, fsdp=2, tensor=1),
        mtp=MTPConfig(regime="occ", estimator="exact", measure_every=2),
    )
    return config, plan(config, virtual(4, 1.0))


def started(config):
    mesh, params = make_mesh(config.mesh), Model(config.model).init(jax.random.key(0))
    params = jax.device_put(params, state_shardings(mesh, params))
    return place_state(config, params, 0, mesh)


def test_planned_bytes_are_those_of_the_live_arrays(planned):
    config, found = planned
    state = started(config)

    def live(tree):
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == jax.devices()[0]
        )

    assert found.parameters == live(state.params) == per_device(state.params)
    assert found.optimizer == live(state.opt_state)
    rows = config.rollout.num_prompts * config.rollout.group_size
    # Keys and values in float32 of 3 + 4 columns, one layer, one head of 8, of a quarter of rows.
    assert found.kv_cache == 2 * 4 * 7 * 8 * rows // 4
    update = next(program for program in found.programs if program.name == "update")
    # A token, its validity; by response column its mask and two log-probabilities; an advantage.
    batch = (rows // 2 // 4) * (7 * (4 + 1) + 4 * (1 + 4 + 4) + 4)
    assert update.arguments == live(state.params) + live(state.opt_state) + 4 + 8 + batch
    # Donated: what comes out beside the new state are metrics.
    assert update.outputs < 1000


def test_every_program_of_a_run_is_planned(planned):
    config, found = planned
    names = [program.name for program in found.programs]
    assert names == ["rollout", "mini-batches", "update", "update between", "evaluation"]
    measured, between = found.programs[2:4]
    # Two pullbacks through the trunk instead of one.
    assert measured.flops > between.flops > 0
    assert measured.collectives and between.collectives
    assert found.fits and found.over == 0
    assert "fits: " in render(found).splitlines()[-1]
    assert json.loads(json.dumps(to_json(found)))["programs"][2]["total"] == measured.total
    # g and h of the trunk, float32 like the parameters, and the module's own.
    trunk = per_device(started(config).params["trunk"])
    assert found.gradients == found.parameters + trunk


def some_plan(**program):
    given = {"name": "update", "resident": GIB, "arguments": 4 * GIB, "outputs": 0}
    given |= {"temporaries": 2 * GIB, "flops": 1e12, "collectives": {}, "largest": []}
    given |= {"seconds": 1.0, "refused": ""}
    return Plan(
        "v5e:2x2", "TPU v5 lite", {"fsdp": 4}, 8 * GIB, 1, 1, 1, 1, (Program(**given | program),)
    )


def test_what_lies_beside_a_program_counts():
    assert verdict(some_plan()) == "fits: update takes most, 7.00 GiB a device, 1.00 GiB to spare"
    over = some_plan(resident=3 * GIB)
    assert not over.fits and over.over == GIB
    assert verdict(over) == "does not fit: update is over by 1.00 GiB a device"


def test_a_program_that_the_compiler_refuses_does_not_fit():
    refused = some_plan(temporaries=0, refused="Ran out of memory")
    assert not refused.fits
    assert verdict(refused) == "does not fit: update is refused: Ran out of memory"


@pytest.mark.parametrize(
    ("said", "size"),
    [
        # sin(x @ x) @ x of 200,000 x 200,000 on a v5e: x and the result in float32, 149.01 GiB
        # each, and x once more in bfloat16 is 372.53; the rest is the compiler's own.
        (
            "total memory required for HLO temporaries (372.65G) exceeds available HBM",
            int(372.65 * GIB),
        ),
        ("Ran out of memory in memory space hbm. Used 16.25G of 15.75G hbm.", 16.25 * GIB),
        ("Ran out of memory in memory space vmem while allocating on stack", 0),
    ],
)
def test_a_refusal_names_what_the_program_needs(said, size):
    assert wanted(said) == size


def run_plan(tmp_path, *arguments):
    return main(["plan", str(config_file(tmp_path)), *arguments])


def test_hosts_that_do_not_divide_the_prompts_are_one_clear_line(tmp_path):
    tiny = tiny_config(tmp_path)
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, num_kv_heads=2),
        rollout=dataclasses.replace(tiny.rollout, num_prompts=1),
        algorithm=dataclasses.replace(tiny.algorithm, updates_per_rollout=1),
        mtp=MTPConfig(regime="detach"),
        mesh=MeshConfig(tensor=2),
    )
    devices: Any = tuple(SimpleNamespace(process_index=host) for host in (0, 1))
    with pytest.raises(UserError, match="is 1; it must be a multiple of the 2 hosts of v0:1x2"):
        plan(config, Machine("v0:1x2", devices, None))


def test_the_command_says_that_it_does_not_fit(tmp_path, capsys):
    options = ("--memory", "1e-5", "--only", "rollout", "--mesh.fsdp", "2")
    assert run_plan(tmp_path, "--devices", "2", *options) == 1
    out = capsys.readouterr().out
    assert out.startswith("2 virtual devices: 2 x cpu of 10 KiB, mesh fsdp 2\n")
    assert out.splitlines()[-1].startswith("does not fit: rollout is over by ")
    assert not (tmp_path / "run").exists()


def test_the_command_tries_slices_until_one_fits(tmp_path, capsys, monkeypatch):
    tried, devices = [], tuple(jax.devices()[:4])
    rooms = {"v5e:2x2": 1000, "v6e:2x2": 2 * GIB, "v5p:2x2x1": 8 * GIB}

    def stub(config, machine, say, only):
        tried.append(machine.name)
        return some_plan(resident=(1 if machine.name.startswith("v5p") else 3) * GIB)

    monkeypatch.setattr(
        occ_jax.planning.machines, "topology", lambda name: Machine(name, devices, rooms[name])
    )
    monkeypatch.setattr(occ_jax.planning.plan, "plan", stub)
    assert run_plan(tmp_path, "--json", "--mesh.fsdp", "4") == 0
    assert tried == ["v6e:2x2", "v5p:2x2x1"]
    out, said = capsys.readouterr()
    assert json.loads(out)["fits"] and json.loads(out)["over"] == 0
    assert json.loads(out)["programs"][0]["total"] == 7 * GIB
    assert "v5e:2x2: does not fit: state and gradients alone take " in said
    assert "v6e:2x2: does not fit: update is over by 1.00 GiB a device" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--devices", "4"),
            "the mesh (data=1, fsdp=1, tensor=1, expert=1) needs 1 devices, 4 virtual",
        ),
        (("--devices", "99"), "--devices is 99; this process has started with 8"),
        (("--memory", "16"), "--memory goes with --devices"),
        (("--devices", "1", "--memory", "nan"), "'nan' is no positive number"),
        (("--devices", "1", "--memory", "-1"), "'-1' is no positive number"),
        (("--topology", "v5e:4x4"), "--topology v5e:4x4 needs the compiler for TPUs"),
        (
            ("--devices", "1", "--only", "updates"),
            "this run has no program 'updates'; it has rollout, mini-batches, update, evaluation",
        ),
        ((), "the mesh needs 1 devices; name a slice of as many with --topology"),
        (("--devices", "2", "--topology", "v5e:4x4"), "not allowed with argument"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    jax.devices()  # all eight, before a plan asks for fewer
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    assert run_plan(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
