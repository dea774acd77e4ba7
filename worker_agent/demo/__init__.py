"""``dtr demo``: the whole runtime at work on real data, with one trainer killed midway, and checks that can fail at the end.

``python -m worker_agent.demo`` starts a local stack in a temporary home, runs ``python -m worker_agent.demo.trainer`` under the
launcher, watches what the trainers write, and reports.
"""
