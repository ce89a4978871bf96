"""Plans of a run on a given machine: its programs compiled ahead of time, never run.

The programs of a run (rollout, mini-batches with their old log-probabilities, updates, evaluation)
are lowered with the config's real shapes and shardings and compiled by the machine's compiler:
libtpu knows every TPU slice by name, and the CPU's compiler stands in for others. Arrays that stay
in memory beside a program, such as Adam's moments while the policy samples, are added to what the
program itself needs; no compiler knows of them.

Operations are those of the traced program's matrix products (`flops`), spread evenly over the
devices; bytes between devices are read from the compiled text (`hlo`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from occ_jax.config import Config
from occ_jax.data.pipeline import prompt_columns
from occ_jax.errors import UserError
from occ_jax.evaluation.evaluate import call_of
from occ_jax.models.cache import cache_shardings, extend
from occ_jax.models.responses import column_positions
from occ_jax.parallel.sharding import make_mesh, replicated, row_sharding
from occ_jax.planning.flops import count_flops
from occ_jax.planning.hlo import collective_bytes, largest_arrays
from occ_jax.planning.machines import GIB, Machine
from occ_jax.programs import Programs, make_programs
from occ_jax.rl.regime import active_estimator, needs_separate_gradients
from occ_jax.rl.train_step import abstract_state
from occ_jax.types import Batch, Params, Rollout, RowFields, TrainState, map_rows

_ENDS = ((0,), 0)  # of a response, and its filler: the tokenizer's; no program is larger for them


class Program(NamedTuple):
    """The needs of one compiled program on one device; bytes unless it says otherwise."""

    name: str
    resident: int  # in memory meanwhile, but no argument of the program
    arguments: int
    outputs: int  # those that take no argument's place
    temporaries: int  # the compiled code included
    flops: float  # matrix products
    collectives: dict[str, int]  # by kind
    largest: list[tuple[int, str]]  # of the arrays it makes
    seconds: float  # of compilation
    refused: str  # the compiler's message if it found no room, else ""

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.resident + self.arguments + self.outputs + self.temporaries


class Plan(NamedTuple):
    """The needs of a run on one device; bytes unless it says otherwise."""

    machine: str
    kind: str  # JAX's name of a device
    mesh: dict[str, int]
    memory: int | None  # of the device; None if unknown
    parameters: int
    optimizer: int
    gradients: int  # within the temporaries of an update: sums over micro-batches
    kv_cache: int  # within the temporaries of the rollout
    programs: tuple[Program, ...]

    @property
    def over(self) -> int:
        """Bytes by which the largest program exceeds the memory; 0 if the memory is unknown."""
        largest = max(program.total for program in self.programs)
        return 0 if self.memory is None else max(0, largest - self.memory)

    @property
    def fits(self) -> bool:
        """Whether every program fits, as far as is known."""
        return self.over == 0 and not any(program.refused for program in self.programs)


def plan(
    config: Config,
    machine: Machine,
    say: Callable[[str], None] = lambda _: None,
    only: Collection[str] = (),
) -> Plan:
    """Compiles every program of a run.

    Args:
        config: the experiment; its mesh uses every device.
        machine: what to compile for.
        say: is called with a line about each program.
        only: names of the programs to compile; empty for all.

    Raises:
        UserError: the mesh and the machine differ in their number of devices, the hosts do not
            divide the prompts, or the run has no program of a name.
    """
    count = len(machine.devices)
    if num_devices(config) != count:
        shape = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(config.mesh).items())
        raise UserError(
            f"the mesh ({shape}) needs {num_devices(config)} devices, {machine.name} has {count}; "
            "set --mesh.* so that the numbers are equal"
        )
    hosts = len({device.process_index for device in machine.devices})
    if config.rollout.num_prompts % hosts != 0:
        raise UserError(
            f"rollout.num_prompts is {config.rollout.num_prompts}; it must be a multiple of the "
            f"{hosts} hosts of {machine.name}"
        )
    mesh = make_mesh(config.mesh, machine.devices)
    step = _step(config, mesh)
    calls = list(_calls(step, config))
    names = [call.name for call in calls]
    for name in only:
        if name not in names:
            raise UserError(f"this run has no program {name!r}; it has {', '.join(names)}")
    programs: list[Program] = []
    for call in calls:
        if not only or call.name in only:
            say(f"{machine.name}: compiling {call.name}")
            needs = _compile(call, machine)
            say(f"  {needs.total / GIB:.2f} GiB a device, {needs.seconds:.0f} s  {needs.refused}")
            programs.append(needs)
    return Plan(
        machine=machine.name,
        kind=machine.devices[0].device_kind,
        mesh=dict(mesh.shape),
        memory=machine.memory,
        parameters=per_device(step.state.params),
        optimizer=per_device(step.state.opt_state),
        gradients=_gradients(step),
        kv_cache=_kv_cache(step),
        programs=tuple(programs),
    )


def minimum_bytes(config: Config, machine: Machine) -> int:
    """Returns the bytes of one device for state and gradients, without activations."""
    step = _step(config, make_mesh(config.mesh, machine.devices))
    return per_device(step.state) + _gradients(step)


def per_device(tree: Any) -> int:
    """Bytes of one device's part of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def num_devices(config: Config) -> int:
    """Returns the number of devices of a config's mesh."""
    return math.prod(dataclasses.asdict(config.mesh).values())


class _Step(NamedTuple):
    """The arguments of a run's programs, as shapes with shardings."""

    programs: Programs
    state: TrainState
    reference: Params | None  # of the KL penalty
    prompts: tuple[Any, Any, Any]  # of the sampler: tokens, validity, key
    rewards: Any
    rollout: Rollout
    batches: list[Batch]


def _step(config: Config, mesh: Mesh) -> _Step:
    columns = (config.rollout.num_prompts, prompt_columns(config))
    programs = make_programs(config, mesh, *_ENDS)
    state, options = abstract_state(programs.model, config, mesh), config.rollout
    reference = state.params["trunk"] if config.algorithm.kl_coefficient > 0 else None
    prompts = (
        jax.ShapeDtypeStruct(columns, jnp.int32, sharding=row_sharding(mesh)),
        jax.ShapeDtypeStruct(columns, jnp.bool, sharding=row_sharding(mesh)),
        jax.eval_shape(jax.random.key, 0).update(sharding=replicated(mesh)),
    )
    groups = (options.num_prompts, options.group_size)
    rewards = jax.ShapeDtypeStruct(groups, jnp.float32, sharding=replicated(mesh))
    rollout = _placed(mesh, jax.eval_shape(programs.sample, state.params, *prompts))
    split = jax.eval_shape(programs.split, state.params, reference, rollout, rewards)
    batches = [_placed(mesh, batch) for batch in split]
    return _Step(programs, state, reference, prompts, rewards, rollout, batches)


def _placed(mesh: Mesh, fields: RowFields) -> RowFields:
    """The shapes of a rollout or a batch with the shardings that its arrays get."""
    return map_rows(lambda x, axis: x.update(sharding=row_sharding(mesh, axis)), fields)


class _Call(NamedTuple):
    """A jitted program with the arguments that a run calls it with, as shapes."""

    name: str
    resident: int  # bytes of one device that are no argument and stay in memory meanwhile
    program: Any
    arguments: tuple[Any, ...]
    static: dict[str, int]  # keyword arguments


def _calls(step: _Step, config: Config) -> Iterator[_Call]:
    programs, state, mesh = step.programs, step.state, step.programs.mesh
    optimizer, reference = per_device(state.opt_state), per_device(step.reference)
    update = (reference + per_device(step.batches[1:]), (state, step.batches[0]))
    training = {
        "rollout": (optimizer + reference, (state.params, *step.prompts)),
        "mini-batches": (optimizer, (state.params, step.reference, step.rollout, step.rewards)),
        "update": update,
        "update between": update,
    }
    for name, program in programs.trained():
        yield _Call(name, training[name][0], program, training[name][1], {})
    samples, columns = config.run.evaluation_samples, step.prompts[0].shape[1]
    size = call_of(config, samples)
    questions = (size.questions * size.copies, columns)
    arguments = (
        state.params,
        *(x.update(shape=questions) for x in step.prompts[:2]),
        step.prompts[2],
        jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(mesh)),
    )
    static, resident = {"num_samples": samples // size.copies}, optimizer + reference
    yield _Call("evaluation", resident, programs.answer, arguments, static)


def _compile(call: _Call, machine: Machine) -> Program:
    started = time.monotonic()
    traced = call.program.trace(*call.arguments, **call.static)
    flops = count_flops(traced.jaxpr) / len(machine.devices)
    size = per_device(call.arguments)
    needs = functools.partial(Program, call.name, call.resident, flops=flops)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refused = " ".join(str(error).split())
        if not refused.startswith("RESOURCE_EXHAUSTED: "):
            raise
        return needs(
            arguments=size,
            outputs=0,
            temporaries=max(0, wanted(refused) - size),
            collectives={},
            largest=[],
            seconds=time.monotonic() - started,
            refused=refused.removeprefix("RESOURCE_EXHAUSTED: "),
        )
    seconds = time.monotonic() - started
    stats, text = compiled.memory_analysis(), compiled.as_text()
    temporaries = _temporaries(stats, machine.devices[0].platform)
    return needs(
        # The compiler pads what it lays out in tiles, and leaves out what the program never reads.
        arguments=max(size, stats.argument_size_in_bytes),
        outputs=_outputs(stats),
        temporaries=temporaries + stats.generated_code_size_in_bytes,
        collectives=collective_bytes(text),
        largest=largest_arrays(text, 5),
        seconds=seconds,
        refused="",
    )


def _outputs(stats: Any) -> int:
    return stats.output_size_in_bytes - stats.alias_size_in_bytes


def _temporaries(stats: Any, platform: str) -> int:
    """Bytes of the heap, the compiled code not included.

    A TPU's compiler reports a size of the heap that has the gaps between its arrays in it twice and
    a peak without them; their mean has them once. If arguments are donated, the peak counts results
    beside the arguments that they replace, which comes to the heap with its gaps.
    docs/results/plans.md compares both with the compiler's log.
    """
    if platform != "tpu":
        return stats.temp_size_in_bytes
    alive = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - _outputs(stats)
    if stats.alias_size_in_bytes > 0:
        return max(0, alive)
    return max(0, (alive + stats.temp_size_in_bytes) // 2)


def wanted(refused: str) -> int:
    """Returns the bytes that a refused program needs, read from the message; 0 if it names none.

    The message counts arguments and outputs among its temporaries.
    """
    size = re.search(r"(?:temporaries \(|Used )(\d+(?:\.\d+)?)([KMGT])", refused)
    if size is None:
        return 0
    return int(float(size.group(1)) * 2 ** (10 * (1 + "KMGT".index(size.group(2)))))


def _gradients(step: _Step) -> int:
    """Sums of g, of every h_k that is kept separate, and of the modules' gradients, in float32."""
    config = step.programs.config
    sums = jax.tree.map(lambda x: x.update(dtype=jnp.float32), step.state.params)
    separate = needs_separate_gradients(active_estimator(config)) * config.model.num_mtp_modules
    return per_device(sums["trunk"]) * (1 + separate) + per_device(sums["mtp"])


def _kv_cache(step: _Step) -> int:
    options = step.programs.config.rollout
    tokens, valid = (
        jax.ShapeDtypeStruct((len(x) // options.sampling_chunks, x.shape[1]), x.dtype)
        for x in step.prompts[:2]
    )

    def cache(params: Params, tokens: Any, valid: Any) -> Any:
        model, positions = step.programs.model, column_positions(valid)
        prompts = model.trunk(params["trunk"], tokens, positions, valid).cache
        return extend(prompts, copies=options.group_size, columns=options.max_new_tokens)

    shapes = jax.eval_shape(cache, step.state.params, tokens, valid)
    shardings = cache_shardings(step.programs.mesh, shapes)
    return per_device(jax.tree.map(lambda x, at: x.update(sharding=at), shapes, shardings))
