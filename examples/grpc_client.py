"""Asks a chat over gRPC, with nothing but grpcio and what protoc makes of the service's .proto:

    pip install grpcio grpcio-tools
    python -m grpc_tools.protoc -Iserving/proto --python_out=. --grpc_python_out=. serving/proto/inference.proto
    PYTHONPATH=. python examples/grpc_client.py 127.0.0.1:9000 "Hello!" [KEY]
"""

from __future__ import annotations

import sys

import grpc
import inference_pb2 as pb
import inference_pb2_grpc


def main(address: str, question: str, key: str | None = None) -> None:
    """Print the answer as it comes, and what it used."""
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=question)]),
                                 sampling=pb.Sampling(max_tokens=200))
    metadata = [("authorization", f"Bearer {key}")] if key else []
    with grpc.insecure_channel(address) as channel:
        for response in inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata):
            print(response.text, end="", flush=True)
    print(f"\n{response.usage.prompt_tokens} + {response.usage.completion_tokens} tokens, {response.finish_reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
