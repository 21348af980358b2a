"""Other libraries' functions, with their names, signatures and conventions, solved by this one.

A program changes one import: ``from geomloss import SamplesLoss`` becomes ``from ecgot.compat.geomloss import
SamplesLoss``, ``import ot`` becomes ``import ecgot.compat.pot as ot``. None of these libraries needs to be
installed. docs/migration.md says what to replace by what.
"""
