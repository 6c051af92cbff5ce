"""One Ray node with Serve's gRPC proxy before a stub of our service. Commands come on stdin."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from cluster.launch.local_nodes import LocalNodes
from cluster.launch.process_marks import stop_processes
from serving.config import LocalNodeConfig

SERVICERS = ["serving.proto.inference_pb2_grpc.add_InferenceServicer_to_server",
             "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"]


def main(grpc_port: int, http_port: int) -> None:
    nodes = LocalNodes()
    try:
        nodes.start_head(LocalNodeConfig(name="proxy", num_cpus=2))
        serve_stub(nodes.address, grpc_port, http_port)
    finally:
        stop_processes(nodes.marks())


def serve_stub(address: str, grpc_port: int, http_port: int) -> None:
    import ray
    from ray import serve

    @serve.deployment
    class Stub:
        def __init__(self) -> None:
            self.was_cancelled = False

        async def Generate(self, request: object) -> AsyncIterator[object]:
            from serving.proto import inference_pb2 as pb
            try:
                while True:
                    yield pb.GenerateResponse(text="more")
                    await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise

        async def Check(self, request: object) -> object:
            from grpc_health.v1 import health_pb2
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

        async def cancelled(self) -> bool:
            return self.was_cancelled

    @serve.deployment
    class Empty:
        def __call__(self) -> None:
            pass

    ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="moesaic")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": http_port},
                grpc_options={"port": grpc_port, "grpc_servicer_functions": SERVICERS})
    handle = serve.run(Stub.bind(), name="stub")
    say("ready")
    for line in sys.stdin:
        if line.strip() == "cancelled?":
            say("yes" if handle.cancelled.remote().result(timeout_s=30.0) else "no")
        elif line.strip() == "second application":
            serve.run(Empty.bind(), name="second", route_prefix="/second")
            say("deployed")
        else:
            break
    ray.shutdown()


def say(text: str) -> None:
    sys.stdout.write(f"stub: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
