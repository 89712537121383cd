/*
 * Scores the lines of stdin: for each line its scores, separated by tabs, in the order of the heads.
 *
 *     cc -std=c99 -o score_lines score_lines.c $(pkg-config --cflags --libs jql)
 *     ./score_lines BUNDLE [LIBONNXRUNTIME] < lines.txt
 */
#define _POSIX_C_SOURCE 200809L
#include <jql.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 1000, ERROR_SIZE = 512 };

/* Scores `n` lines and prints them; returns 0, or 1 after an error. */
static int score(jql_engine *engine, char **lines, const size_t *lengths, size_t n) {
  char err[ERROR_SIZE];
  size_t n_heads = jql_head_count(engine), i, head;
  float *scores = malloc((n * n_heads + 1) * sizeof *scores);
  int32_t *status = malloc((n + 1) * sizeof *status);
  int failed = !scores || !status;
  if (!failed && jql_score_texts(engine, (const char *const *)lines, lengths, n, scores, NULL, NULL, status, err,
                                 sizeof err) != JQL_OK) {
    fprintf(stderr, "%s\n", err);
    failed = 1;
  }
  for (i = 0; !failed && i < n; ++i) {
    for (head = 0; head < n_heads; ++head) printf("%s%.4f", head ? "\t" : "", scores[i * n_heads + head]);
    printf("%s\n", status[i] == JQL_OK ? "" : "\tnot UTF-8");
  }
  free(scores);
  free(status);
  return failed;
}

int main(int argc, char **argv) {
  static char *lines[BATCH];
  static size_t lengths[BATCH];
  char err[ERROR_SIZE];
  jql_options options = JQL_OPTIONS_INIT;
  jql_engine *engine;
  size_t n = 0, capacity = 0, i;
  char *line = NULL;
  ssize_t length = 0;
  int failed = 0;

  if (argc < 2) return fprintf(stderr, "usage: %s BUNDLE [LIBONNXRUNTIME] < LINES\n", argv[0]), 2;
  options.onnxruntime = argc > 2 ? argv[2] : NULL;
  if (jql_open(argv[1], &options, &engine, err, sizeof err) != JQL_OK) return fprintf(stderr, "%s\n", err), 1;
  while (!failed && length >= 0) {
    length = getline(&line, &capacity, stdin);
    if (length >= 0) {
      lengths[n] = (size_t)length - (length > 0 && line[length - 1] == '\n');
      lines[n++] = line;
      line = NULL, capacity = 0; /* the next line gets memory of its own */
    }
    if (n == BATCH || (length < 0 && n > 0)) {
      failed = score(engine, lines, lengths, n);
      for (i = 0; i < n; ++i) free(lines[i]);
      n = 0;
    }
  }
  free(line);
  jql_close(engine);
  return failed;
}
