"""Asks a gRPC service for its health: exit code 0 when it serves. For container health checks.

python -m penstock.protos.probe 127.0.0.1:50051 [SERVICE]
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def serving(target: str, service: str = "") -> bool:
    """Whether `service` ("" for the whole server) at `target` answers SERVING within TIMEOUT_S seconds."""
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(not serving(*sys.argv[1:3]))
