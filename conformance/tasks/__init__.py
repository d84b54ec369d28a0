"""Tasks beside measure.py's, a file a group of laws: functions that run in a rank or in the clean world and send numbers back."""
