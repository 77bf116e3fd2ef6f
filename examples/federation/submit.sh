#!/bin/sh
# In the server's container: make the clients' keys known, and start the run.
set -e
mkdir -p ~/.flwr
cat > ~/.flwr/config.toml <<'TOML'
[superlink]
default = "here"

[superlink.here]
address = "server:8000"
root-certificates = "/keys/ca.crt"
TOML
for key in /keys/client_*.key.pub; do
    flwr supernode register "$key" here || echo "$key is known already"
done
flwr run /fedamm/examples/federation/app here --stream --run-config 'output-dir="/runs/federation"'
