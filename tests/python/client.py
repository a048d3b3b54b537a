"""Checks a running cluster with grpcio: generated stubs, reflection, health, streaming, errors.

Usage: client.py PROTO_DIRECTORY HOST:PORT. It starts nothing and knows nothing of Paceline's own code.
"""

import importlib
import sys
import tempfile

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc

PROMPT = "The three primary colours are"


def stubs(proto_directory):
    """Modules generated from inference.proto."""
    out = tempfile.mkdtemp()
    arguments = ["protoc", f"-I{proto_directory}", f"--python_out={out}", f"--grpc_python_out={out}", "inference.proto"]
    assert protoc.main(arguments) == 0, "inference.proto does not compile"
    sys.path.insert(0, out)
    return importlib.import_module("inference_pb2"), importlib.import_module("inference_pb2_grpc")


def request(pb, n_tokens, **sampling):
    return pb.GenerateRequest(
        prompt=PROMPT,
        sampling=pb.SamplingOptions(**sampling),
        stop=pb.StopOptions(max_tokens=n_tokens, ignore_eos=True),
    )


def check_streaming(pb, stub):
    chunks = list(stub.Generate(request(pb, 12, temperature=0.0)))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks))), "chunks are numbered"
    assert chunks[0].WhichOneof("event") == "started"
    assert chunks[-1].WhichOneof("event") == "finished"
    deltas = [chunk.delta for chunk in chunks[1:-1]]
    assert len(deltas) > 1, "the answer is streamed"
    tokens = [token for delta in deltas for token in delta.token_ids]
    finished = chunks[-1].finished
    assert len(tokens) == 12 == finished.usage.completion_tokens
    assert finished.reason == pb.FINISH_REASON_LENGTH
    text = "".join(delta.text for delta in deltas)
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens)).text == text
    return tokens


def check_zero_is_a_value(pb, stub, greedy):
    """Temperature 0 on the wire is greedy; absent is 1."""
    seeded = [list(stub.Generate(request(pb, 12, seed=seed))) for seed in (1, 2)]
    sampled = [[token for chunk in chunks for token in chunk.delta.token_ids] for chunks in seeded]
    assert sampled[0] != sampled[1], "an absent temperature is not 0"
    again = [token for chunk in stub.Generate(request(pb, 12, temperature=0.0, seed=9)) for token in chunk.delta.token_ids]
    assert again == greedy, "temperature 0 does not depend on the seed"


def check_errors(pb, stub):
    cases = [
        (pb.GenerateRequest(model="nope", prompt="x"), grpc.StatusCode.NOT_FOUND, "nope"),
        (request(pb, 4, temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (pb.GenerateRequest(prompt=""), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
    ]
    for bad, code, part in cases:
        try:
            list(stub.Generate(bad))
            raise AssertionError(f"accepted: {bad}")
        except grpc.RpcError as error:
            assert error.code() == code, f"{error.code()}: {error.details()}"
            assert part in error.details(), error.details()


def check_cancel(pb, stub):
    stream = stub.Generate(request(pb, 4000, temperature=0.0))
    next(stream)
    next(stream)
    stream.cancel()
    try:
        for _ in stream:
            pass
        raise AssertionError("a cancelled stream ended well")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.CANCELLED


def check_reflection(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    services = database.get_services()
    assert "paceline.v1.Inference" in services, services
    assert "grpc.health.v1.Health" in services, services
    service = DescriptorPool(database).FindServiceByName("paceline.v1.Inference")
    assert service.methods_by_name["Generate"].server_streaming


def main():
    proto_directory, address = sys.argv[1:]
    pb, pb_grpc = stubs(proto_directory)
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "paceline.v1.Inference"):
            status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING, (service, status)
        models = stub.ListModels(pb.ListModelsRequest()).models
        assert [model.name for model in models] == ["test-model"]
        greedy = check_streaming(pb, stub)
        check_zero_is_a_value(pb, stub, greedy)
        check_errors(pb, stub)
        check_cancel(pb, stub)
        check_reflection(channel)
        assert check_streaming(pb, stub) == greedy, "after all this the answer is the same"
    print("all checks passed")


if __name__ == "__main__":
    main()
