"""Published tokenizers of other libraries, one family a file. A new family is one new file, without any other edit."""
