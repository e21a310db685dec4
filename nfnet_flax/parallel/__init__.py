"""Device meshes, sums over devices, and the processes of a run."""
