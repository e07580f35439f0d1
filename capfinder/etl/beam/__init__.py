"""The ETL's heavy part on Apache Beam. Beam itself is imported inside functions alone: it is an
extra (pip install '.[beam]'), and takes seconds."""
