"""From stored answers to a report: settings, the judge, tables, comparisons, the scores on a model card."""
