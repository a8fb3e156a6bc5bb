"""Programs of a Slurm job."""
