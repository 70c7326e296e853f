"""A run's log in memory: what an `RTOTrainer` says and finds."""

from rto_fast.reporting.log import Finding


class RecordedLog:
    def __init__(self):
        self.said, self.findings, self.records = [], [], []

    def say(self, text):
        self.said.append(text)

    def warning(self, stage, step, *finding):
        self.findings.append(Finding(*finding))

    def tokens(self, stage, step, records):
        self.records.append((step, records))
