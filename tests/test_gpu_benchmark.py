"""Where the time of a step went, from traces written by hand and one of this machine; what the GPU benchmark is told."""

import gzip
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import device_time, gpu_training

HLO = """HloModule jit_step, is_scheduled=true

%fused_norm (p0: bf16[4,8]) -> f32[4] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %c = f32[4,8]{1,0} convert(%p0), metadata={op_name="jit(step)/jvp(UNet)/conv_in/convert"}
  %m = f32[4,8]{1,0} multiply(%c, %c), metadata={op_name="jit(step)/jvp(UNet)/down0_0_block/norm1/mul"}
  %z = f32[] constant(0)
  ROOT %r = f32[4]{0} reduce(%m, %z), dimensions={1}, to_apply=%add, metadata={op_name="jit(step)/jvp(UNet)/down0_0_block/norm1/reduce_sum"}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused_bits (p0.1: u32[8]) -> pred[8] {
  %p0.1 = u32[8]{0} parameter(0)
  %l = u32[8]{0} shift-left(%p0.1, %p0.1), metadata={op_name="jit(step)/jvp(UNet)/down0_0_block/Dropout_0/jit(_bernoulli)/shift_left"}
  %x = u32[8]{0} xor(%l, %p0.1), metadata={op_name="jit(step)/jvp(UNet)/down0_0_block/Dropout_0/jit(_bernoulli)/xor"}
  ROOT %lt = pred[8]{0} compare(%x, %p0.1), direction=LT
}

%fused_turn (p0.2: f32[4,8]) -> f32[8,4] {
  %p0.2 = f32[4,8]{1,0} parameter(0)
  ROOT %t = f32[8,4]{1,0} transpose(%p0.2), dimensions={1,0}
}

ENTRY %main (x: bf16[4,8]) -> f32[4] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %cudnn-conv.1 = (bf16[4,8]{1,0}, u8[0]{0}) custom-call(%x.1, %x.1), custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(UNet)/down0_0_block/conv1/conv_general_dilated"}
  %cudnn-conv-bw-filter.2 = (bf16[4,8]{1,0}, u8[0]{0}) custom-call(%x.1, %x.1), custom_call_target="__cudnn$convBackwardFilter", metadata={op_name="jit(step)/transpose(jvp(UNet))/down0_0_block/conv1/conv_general_dilated"}
  %gemm.3 = bf16[4,8]{1,0} custom-call(%x.1, %x.1), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(UNet)/down1_0_attention/q/dot_general"}
  %loop_xor_fusion = pred[8]{0} fusion(%x.1), kind=kLoop, calls=%fused_bits
  %transpose_fusion = f32[8,4]{1,0} fusion(%x.1), kind=kInput, calls=%fused_turn
  %wrapped_add.7 = f32[4]{0} add(%x.1, %x.1), metadata={op_name="jit(step)/add"}
  ROOT %input_reduce_fusion.4 = f32[4]{0} fusion(%x.1), kind=kInput, calls=%fused_norm, metadata={op_name="jit(step)/jvp(UNet)/down0_0_block/norm1/reduce_sum"}
}
"""  # noqa: E501


def event(name, start, length, instruction=None, thread=7, **more):
    args = {} if instruction is None else {"hlo_op": instruction, "hlo_module": "jit_step"}
    return {"ph": "X", "pid": 1, "tid": thread, "ts": start, "dur": length, "name": name, "args": args, **more}


TRACE = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
    {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Ops"}},
    {"ph": "M", "pid": 2, "tid": 7, "name": "thread_name", "args": {"name": "Stream of the host"}},
    event("sm90_xmma_fprop_implicit_gemm", 100, 40, "cudnn-conv.1"),
    event("sm90_xmma_wgrad_implicit_gemm", 140, 60, "cudnn-conv-bw-filter.2"),
    event("void nchwToNhwcKernel", 200, 10, "cudnn-conv-bw-filter.2"),
    event("nvjet_tst_128x64", 210, 20, "gemm.3"),
    event("loop_xor_fusion", 240, 10, "loop_xor_fusion"),  # 10 idle before
    event("input_reduce_fusion_4", 250, 25),  # in a CUDA graph: only its name tells
    event("transpose_fusion", 270, 10, "transpose_fusion"),  # 5 of it beside the one before
    event("wrapped_add_7", 280, 10, "wrapped_add.7"),
    event("MemcpyD2D", 290, 10),
    event("the same once more", 100, 200, "cudnn-conv.1", thread=8),
    {**event("the host", 0, 1000), "pid": 2},
]


def parsed(table):
    """A Markdown table's rows by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {cells[0]: cells[1:] for cells in lines}


def test_kernels_are_those_of_the_device_s_streams():
    found = device_time.of_events(TRACE)
    assert [k.start for k in found] == [100, 140, 200, 210, 240, 250, 270, 280, 290]
    assert sum(k.length for k in found) == 195
    assert device_time.busy(found) == 190  # of 200, one gap of 10 and an overlap of 5


def test_every_kernel_has_the_kind_that_its_instruction_says():
    program = device_time.instructions(HLO)
    told = {k.name: device_time.described(k, program) for k in device_time.of_events(TRACE)}
    assert {name: each.kind for name, each in told.items()} == {
        "sm90_xmma_fprop_implicit_gemm": "convolution",
        "sm90_xmma_wgrad_implicit_gemm": "convolution, backward",
        "void nchwToNhwcKernel": "copies and transposes",
        "nvjet_tst_128x64": "matrix product",
        "loop_xor_fusion": "random bits",
        "input_reduce_fusion_4": "reductions",
        "transpose_fusion": "copies and transposes",
        "wrapped_add_7": "elementwise",
        "MemcpyD2D": "copies and transposes",
    }
    # A fusion is of the part that most of it is of: not of the conversion that it begins with.
    assert device_time.part_of(told["input_reduce_fusion_4"].path) == "norm and SiLU"
    assert device_time.part_of(told["loop_xor_fusion"].path) == "dropout and its random bits"
    assert device_time.part_of(told["nvjet_tst_128x64"].path) == "attention"
    assert device_time.part_of(told["wrapped_add_7"].path) == "clip, optimizer, average"
    assert device_time.part_of(told["MemcpyD2D"].path) == "not told"


def test_the_tables_share_out_all_of_the_time():
    found, program = device_time.of_events(TRACE), device_time.instructions(HLO)
    kinds = parsed(device_time.by_kind(found, program, steps=2))
    assert kinds["convolution, backward"] == ["0.030", "30.0%", "0"]
    assert kinds["copies and transposes"][:2] == ["0.015", "15.0%"]
    assert kinds["idle"][:2] == ["0.005", "5.0%"]
    assert kinds["all, by the clock"][0] == "0.100"
    parts = parsed(device_time.by_part(found, program, steps=1))
    assert parts["convolutions"] == ["0.040", "0.070", "56.4%"]
    assert sum(float(cell) for row in parts.values() for cell in row[:2]) == pytest.approx(0.195)
    top = device_time.costliest(found, program, steps=1, most=1).splitlines()
    assert len(top) == 3 and "cudnn-conv-bw-filter.2" in top[2] and "0.070" in top[2]


def test_a_trace_of_pytorch_is_told_by_names(tmp_path):
    names = ["sm90_wgrad", "triton_red_fused_native_group_norm_3", "triton_poi_fused_add", "cutlass::gemm", "flash_fwd_kernel"]
    events = [{"ph": "X", "pid": 0, "tid": 7, "ts": i, "dur": 1, "name": name, "cat": "kernel"} for i, name in enumerate(names)]
    events.append({"ph": "X", "pid": 0, "tid": 1, "ts": 0, "dur": 9, "name": "aten::conv2d", "cat": "cpu_op"})
    (tmp_path / "peer.json").write_text(json.dumps({"traceEvents": events}))
    kinds = parsed(device_time.report(tmp_path / "peer.json").split("\n\n")[0])
    expected = {"convolution, backward", "reductions", "elementwise", "matrix product", "attention"}
    assert {kind for kind, row in kinds.items() if row[1] == "20.0%"} == expected


def test_the_newest_trace_of_a_folder_is_read(tmp_path, capsys):
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": TRACE}, file)
    (tmp_path / "step.hlo.txt").write_text(HLO)
    device_time.main([str(tmp_path), "--steps=2"])
    assert "| convolutions | 0.020 | 0.035 | 56.4% |" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no \*\.trace"):
        device_time.kernels(folder.parent.parent / "nothing")


def test_a_profile_of_this_machine_names_its_products(tmp_path):
    x = jnp.ones((64, 64))
    program = jax.jit(lambda x: jnp.sin(x @ x)).lower(x).compile()
    program(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        program(x).block_until_ready()
    told = [device_time.described(k, device_time.instructions(program.as_text())) for k in device_time.kernels(tmp_path)]
    assert "matrix product" in {each.kind for each in told}


def test_a_variant_is_keys_options_and_words():
    made = gpu_training.variant("rbg + model.multipliers=(1, 2)+xla_gpu_enable_triton_gemm=False+model.attend=Attention(groups=4)")
    assert made.words == {"rbg"}
    assert made.config == {"model.multipliers": (1, 2), "model.attend": "Attention(groups=4)"}
    assert made.options == {"xla_gpu_enable_triton_gemm": False}
    assert gpu_training.variant("") == gpu_training.Variant({}, {}, frozenset())
    with pytest.raises(ValueError, match="'cudn' is no setting; allowed: rbg"):
        gpu_training.variant("cudn")


@pytest.mark.slow
def test_the_benchmark_runs_small(tmp_path, capsys):
    gpu_training.main(
        ["--batch", "2", "--channels=8", "--size=8", "--set=model.blocks=1+model.multipliers=(1, 2)", "--dtype=float32"]
        + ["--matrix=64", "--steps=2", "--repeats=2", "--variants=rbg; nonsense; scan", f"--profile={tmp_path}"]
    )
    printed = capsys.readouterr().out
    assert "nonsense is left out: ValueError" in printed
    assert all(f"| 2 | {name} |" in printed for name in ("jaxdiff", "jaxdiff, rbg", "jaxdiff, scan"))
    assert "| convolutions |" in printed
