/*
 * Opens a bundle, scores, meets every kind of error, scores from several threads, and closes: for valgrind and the
 * sanitizers, which see in a program what they do not see below Python.
 *
 *     lifecycle BUNDLE LIBONNXRUNTIME [THREADS]
 */
#include <jql.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXTS = 6, MOST_HEADS = 64, MOST_IDS = 8192 };

static const char* const texts[TEXTS] = {"Water boils.", "", NULL, "bad \xff", "9.9.9.9.9.9.9.9. </s> \xE2\x82\xAC",
                                         "a b c"};

static void expect(jql_status found, jql_status expected, const char* err) {
  if (found == expected) return;
  fprintf(stderr, "%s, expected %s: %s\n", jql_status_name(found), jql_status_name(expected), err);
  exit(1);
}

static void* use(void* engine) {
  char err[256];
  float scores[TEXTS * MOST_HEADS];
  int32_t status[TEXTS], n_tokens[TEXTS], ids[MOST_IDS], truncated;
  uint8_t cut[TEXTS];
  int64_t offsets[2] = {0, 0};
  size_t n_ids, round;
  for (round = 0; round < 10; ++round) {
    expect(jql_score_texts(engine, texts, NULL, TEXTS, scores, n_tokens, cut, status, err, sizeof err), JQL_OK, err);
    if (status[3] != JQL_INVALID_TEXT || scores[0] != scores[0]) exit(2);
    expect(jql_score_texts(engine, texts, NULL, TEXTS, scores, NULL, NULL, NULL, err, sizeof err), JQL_INVALID_TEXT,
           err);
    expect(jql_tokenize(engine, texts[4], strlen(texts[4]), ids, MOST_IDS, &n_ids, &truncated, err, sizeof err), JQL_OK,
           err);
    expect(jql_tokenize(engine, "a", 1, ids, 0, &n_ids, NULL, err, sizeof err), JQL_BUFFER_TOO_SMALL, err);
    offsets[1] = (int64_t)n_ids;
    expect(jql_score_tokens(engine, ids, offsets, 1, scores, err, sizeof err), JQL_OK, err);
    ids[0] = -1;
    expect(jql_score_tokens(engine, ids, offsets, 1, scores, err, sizeof err), JQL_INVALID_ARGUMENT, err);
  }
  return NULL;
}

int main(int argc, char** argv) {
  char err[256];
  jql_options options = JQL_OPTIONS_INIT;
  jql_engine* engine = NULL;
  pthread_t threads[16];
  int n_threads = argc > 3 ? atoi(argv[3]) : 1, i;
  if (argc < 3 || n_threads < 1 || n_threads > 16) return 2;
  options.onnxruntime = argv[2];
  options.threads = 2;
  expect(jql_open("/nowhere", &options, &engine, err, sizeof err), JQL_INVALID_BUNDLE, err);
  options.variant = "none";
  expect(jql_open(argv[1], &options, &engine, err, sizeof err), JQL_UNSUPPORTED, err);
  options.variant = NULL;
  options.onnxruntime = "/nowhere.so";
  expect(jql_open(argv[1], &options, &engine, err, sizeof err), JQL_NO_RUNTIME, err);
  options.onnxruntime = argv[2];
  expect(jql_open(argv[1], &options, &engine, err, sizeof err), JQL_OK, err);
  expect(jql_score_tokens(engine, NULL, NULL, 1, NULL, err, sizeof err), JQL_INVALID_ARGUMENT, err);
  for (i = 0; i < n_threads; ++i) pthread_create(&threads[i], NULL, use, engine);
  for (i = 0; i < n_threads; ++i) pthread_join(threads[i], NULL);
  jql_close(engine);
  jql_close(NULL);
  puts("fine");
  return 0;
}
