"""Journeys over HTTP against real server processes: what runs before and after them.

Servers are started when a feature first names them and live to the end of the run; every scenario leaves them idle.
"""

import sys
from pathlib import Path

from behave.model import Scenario
from behave.runner import Context

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import features.vocabulary  # noqa: F401 (the types of words that steps are made of)
from tests.support.deployment import Deployments


def before_all(context: Context) -> None:
    context.deployments = Deployments()
    context.measurements = []


def before_scenario(context: Context, scenario: Scenario) -> None:
    context.world = None


def after_scenario(context: Context, scenario: Scenario) -> None:
    if context.world is not None:
        context.world.leave()


def after_all(context: Context) -> None:
    for line in context.measurements:
        print(f"measured: {line}", file=sys.__stdout__)
    context.deployments.stop()
