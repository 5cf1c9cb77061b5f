"""Other processes of ours: how they are started, and how they are talked to. No pickle: whoever gets at a socket could
run code by it."""
