"""What a model promises its callers, and how a loss is told."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.parser
import pytest
from onnx import ModelProto, helper

from fuser.proof.interface import compare_onnx


def model() -> ModelProto:
    made = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "custom" : 2], producer_name: "tool", model_version: 3>
        g (float[N,3] x, int64[2] n, float[4] w) => (float[N,3] y, float[N,3] z)
        <float[4] w = {0, 0, 0, 0}> { y = Relu (x)  z = Neg (x) }""")
    helper.set_model_props(made, {"labels": "a,b"})
    made.graph.input[0].type.denotation = "IMAGE"
    made.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    return made


def reverse_outputs(m: ModelProto) -> None:
    outputs = [m.graph.output[1], m.graph.output[0]]
    del m.graph.output[:]
    m.graph.output.extend(outputs)


def x_of(m: ModelProto) -> onnx.TypeProto:
    return m.graph.input[0].type


LOSSES: list[tuple[Callable[[ModelProto], object], str]] = [
    (lambda m: m.graph.output[0].__setattr__("name", "v"), "output 'y' is missing"),
    (lambda m: m.graph.output.pop(), "output 'z' is missing"),
    (reverse_outputs, "the outputs are in another order: 'z', 'y' instead of 'y', 'z'"),
    (lambda m: m.graph.input.pop(1), "input 'n' is missing"),
    (
        lambda m: m.graph.input.pop(2),
        "input 'w' is missing, with a default value in the original: "
        "--freeze-inputs, in Python removed_inputs, allows that",
    ),
    (lambda m: m.graph.initializer.pop(), "input 'w' is without a default value now, and had one"),
    (lambda m: [m.graph.output.pop() for _ in range(2)], "outputs 'y', 'z' are missing"),
    (lambda m: m.graph.input.add(name="v"), "input 'v' is new"),
    (
        lambda m: x_of(m).tensor_type.__setattr__("elem_type", 10),
        "input 'x': its type was float and is float16",
    ),
    (
        lambda m: x_of(m).tensor_type.shape.dim[0].__setattr__("dim_value", 1),
        "input 'x': dimension 0 was dynamic (N) and is 1",
    ),
    (
        lambda m: x_of(m).tensor_type.shape.dim[0].__setattr__("dim_value", 0),
        "input 'x': dimension 0 was dynamic (N) and is 0",
    ),
    (
        lambda m: x_of(m).tensor_type.shape.dim[0].ClearField("dim_param"),
        "input 'x': dimension 0 was dynamic (N) and is dynamic",
    ),
    (lambda m: x_of(m).tensor_type.shape.dim.pop(), "input 'x': its rank was 2 and is 1"),
    (lambda m: x_of(m).tensor_type.ClearField("shape"), "input 'x': its shape is lost"),
    (lambda m: x_of(m).ClearField("denotation"), "input 'x': its denotation 'IMAGE' is lost"),
    (
        lambda m: x_of(m).tensor_type.shape.dim[0].ClearField("denotation"),
        "input 'x': the denotation 'DATA_BATCH' of dimension 0 is lost",
    ),
    (lambda m: m.metadata_props.pop(), "the metadata property 'labels' is lost"),
    (
        lambda m: m.metadata_props[0].__setattr__("value", "a"),
        "the metadata property 'labels' has changed",
    ),
    (lambda m: m.__setattr__("producer_name", "other"), "the model's producer_name was 'tool' and is 'other'"),
    (lambda m: m.__setattr__("model_version", 4), "the model's model_version was 3 and is 4"),
    (lambda m: m.opset_import[0].__setattr__("version", 18), "the opset import ai.onnx was 17 and is 18"),
    (lambda m: m.opset_import.pop(), "the opset import custom is lost"),
]


@pytest.mark.parametrize(("change", "sentence"), LOSSES, ids=[sentence for _, sentence in LOSSES])
def test_a_loss_is_told_in_one_sentence(change: Callable[[ModelProto], object], sentence: str) -> None:
    after = model()
    change(after)
    assert sentence in compare_onnx(model(), after)


def test_the_same_interface_has_no_problems_and_additions_are_none() -> None:
    after = model()
    helper.set_model_props(after, {"labels": "a,b", "more": "yes"})
    after.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert compare_onnx(model(), after) == []


def test_a_shape_that_was_never_declared_may_be_gained() -> None:
    before = model()
    before.graph.output[0].type.tensor_type.ClearField("shape")
    assert compare_onnx(before, model()) == []


def test_inputs_that_were_asked_to_go() -> None:
    after = model()
    after.graph.input.pop(2)
    assert compare_onnx(model(), after, removed_inputs=["w"]) == []
    assert compare_onnx(model(), model(), removed_inputs=["w"]) == []


def test_sequences_keep_the_type_of_their_items() -> None:
    before, after = model(), model()
    for one, element in ((before, 1), (after, 7)):
        one.graph.output[0].type.sequence_type.elem_type.tensor_type.elem_type = element
    assert compare_onnx(before, after) == ["output 'y': its type was float and is int64"]
    assert compare_onnx(model(), after) == ["output 'y': it was a tensor and is a sequence"]


def test_before_ir_4_an_initializer_is_no_input_of_a_caller() -> None:
    before, folded = model(), model()
    before.ir_version = folded.ir_version = 3
    folded.graph.initializer[0].name = folded.graph.input[2].name = "w_folded"
    assert compare_onnx(before, folded) == []
    later = model()
    later.graph.input.pop()
    assert compare_onnx(before, later) == []
    folded.graph.initializer.pop()
    assert compare_onnx(before, folded) == ["input 'w_folded' is new"]
    constant = model()
    constant.ir_version = 3
    constant.graph.initializer.add(name="x", data_type=onnx.TensorProto.FLOAT, dims=[0])
    constant.graph.input.pop(0)
    assert compare_onnx(before, constant) == ["input 'x' is missing"]
