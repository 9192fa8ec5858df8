"""The parts of ``scripts/fault_campaign.py``: trainers that are killed, and what has to be true of them afterwards."""
