"""What a run costs: floating-point operations, and the memory and speed of devices."""
