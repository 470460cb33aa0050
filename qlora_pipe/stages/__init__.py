"""The stages: one public function each, from folders to a folder."""
