"""Trajectories of other programs and models, made into rows for supervised fine-tuning."""
