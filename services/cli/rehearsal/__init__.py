"""A rehearsal of the worst day: load, kills, and a proof that every accepted event is in HDF5 once and in order.

``fiq demo`` runs it on generated consultations; the acceptance tests on real ones.
"""
