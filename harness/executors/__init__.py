"""Executors: who runs cells. `local` has worker processes on this machine."""
