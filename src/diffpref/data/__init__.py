"""Preference data: published formats -> the normal form -> what training reads."""
