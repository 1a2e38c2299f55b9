"""Objectives: what is optimised and how it is judged. All run in the one loop (`training/session.py`)."""
