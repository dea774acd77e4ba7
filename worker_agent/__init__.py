"""The trainer's side of dtr: a light agent that talks to Redis directly, and the launcher that starts and watches trainers."""

from worker_agent.agent import Agent

__all__ = ["Agent", "TrainingOrchestrator"]

TrainingOrchestrator = Agent
