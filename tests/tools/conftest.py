"""The demo's settings, as its command makes them."""

import pytest

from fusedlr import demo
from fusedlr.console import Parser
from fusedlr.demo import options


@pytest.fixture
def parser():
    parser = Parser(prog="fusedlr demo")
    demo.add_arguments(parser)
    return parser


@pytest.fixture
def resolve(parser, tmp_path):
    """Options to settings, with output and cache in a temporary folder."""
    places = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]

    def resolve(*arguments):
        return options.resolve(parser.parse_args([*places, *arguments]), parser)

    return resolve
