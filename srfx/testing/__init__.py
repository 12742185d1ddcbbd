"""For the tests of those who build on srfx: is a minimized model as small as its zeros allow?"""

from srfx.testing.probe import Leftover, Probe, ValueProbe, probe

__all__ = ["Leftover", "Probe", "ValueProbe", "probe"]
