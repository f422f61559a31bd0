"""The contract and what all services share."""

import os

# Children here are programs of their own: gRPC's handlers at fork have nothing to keep, and its poller ends a
# child that is forked in an unlucky moment. Read when gRPC is imported, which is why it stands here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
